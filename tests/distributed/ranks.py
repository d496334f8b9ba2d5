"""Starts a function on several real processes joined by gloo, and brings back what each returned.

A target is `package.module:function`; it is called with the arguments given (anything JSON holds) after the process
group is up, and what it returns must be JSON too. Start-up costs seconds a rank, so a target should check many cases.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launchers import local
from launchers.local import free_port

ROOT = Path(__file__).resolve().parents[2]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The launcher's own, on the CPU with one thread, and with the project importable."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**local.rank_environment(rank, ranks, port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


def run_ranks(target: str, ranks: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Results of `target(*arguments)` by rank. Raises AssertionError with every rank's last lines when one fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        processes = []
        for rank in range(ranks):
            command = [sys.executable, "-m", "tests.distributed.ranks", target, json.dumps(arguments), f"{folder}/result{rank}.json"]
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=rank_environment(rank, ranks, port), stdout=log, stderr=subprocess.STDOUT)
                )
        try:
            codes: list[int | None] = [process.wait(timeout=timeout) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
        tails = "\n".join(f"--- rank {rank} (code {codes[rank]})\n" + log.read_text()[-3000:] for rank, log in enumerate(logs))
        assert all(code == 0 for code in codes), f"{target} on {ranks} ranks failed (codes {codes})\n{tails}"
        return [json.loads(Path(folder, f"result{rank}.json").read_text()) for rank in range(ranks)]


def _main() -> None:
    import torch.distributed as dist

    target, arguments, result = sys.argv[1:]
    module, function = target.split(":")
    dist.init_process_group("gloo")
    value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    if dist.is_initialized():  # a target that trains ends the group itself
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _main()
