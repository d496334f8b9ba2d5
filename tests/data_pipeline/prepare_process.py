"""A process that prepares a set with two workers and dies on the way, or does not.

python -m tests.data_pipeline.prepare_process SOURCE TOKENIZER OUT PIDS|-

With a file PIDS: after the first shards it writes the ids of its workers there and kills itself (-9).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from data_pipeline import Progress, encoding, prepare, shards


def main(source: str, tokenizer: str, out: str, pids: str) -> None:
    encoding.CHUNK, shards.SHARD_BYTES = 2000, 2000

    def die(progress: Progress) -> None:
        if pids != "-" and progress.tokens > 5000:
            Path(pids).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)

    prepare([source], out, tokenizer=tokenizer, sequence_length=32, validation=0, workers=2, progress=die)


if __name__ == "__main__":
    main(*sys.argv[1:])
