"""The entry of every rank, one screen: parse, build, run, close.

    deepspeed pretrain/train.py RECIPE section.key=value ... [--resume]        (or torchrun, or plain python for one process)

The rank comes from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it this is a run of
one. Exit codes: 0 done, 2 refused, 3 saved and stopped by a signal, 4 too many non-finite steps, 5 checkpoint not
written, 6 copies of a tensor differ, 7 a rank hung, 130 interrupted. Anything else is a bug and leaves its traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if __name__ == "__main__" and sys.path[0] == str(_HERE):
    sys.path[0] = str(_HERE.parent)  # run as a file: the rooms are beside this one, and its modules must not shadow others

_OTHERS_WAIT = 2.0
"""Seconds another rank leaves rank 0 to speak; the launcher ends it meanwhile, so that one message is printed, not one a rank."""


def prepare_environment(local_rank: int | None = None) -> None:
    """Completes the rank's variables: those of a run of one where no launcher set any, and streaming's name for the local size."""
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's name; streaming reads the other
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if "RANK" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def run(recipe: str, overrides: Sequence[str], resume: bool, local_rank: int | None = None) -> None:
    """Trains the recipe as the rank that the environment names. Raises Refusal and RunStopped."""
    from pretrain.config import load_any

    resolved = load_any(recipe, overrides)
    prepare_environment(local_rank)
    from pretrain.trainer import train

    train(resolved, resume)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of one rank."""
    parser = argparse.ArgumentParser(description="Train a recipe as one rank of a run.", epilog=__doc__)
    parser.add_argument("recipe", help="a name under launchers/recipes or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parsed = parser.parse_intermixed_args(arguments)

    from pretrain.errors import Refusal, RunStopped

    try:
        run(parsed.recipe, parsed.overrides, parsed.resume, parsed.local_rank)
    except Refusal as refusal:
        _say_refusal(str(refusal))
        return 2
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks agreed to stop, or rank 0 alone could not write
            print(stopped, file=sys.stderr, flush=True)
        return stopped.code
    except KeyboardInterrupt:
        return 130
    return 0


def _say_refusal(message: str) -> None:
    """Says why this rank ends. A rank other than 0 speaks only if it is still there after rank 0 had time to: its fault may be its own."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_OTHERS_WAIT)
    print(f"rank {rank}: error: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
