"""Starts a function on several real processes joined by gloo, and brings back what each returned.

A target is `package.module:function`; it is called with the arguments given (anything JSON holds) after the process
group is up, and what it returns must be JSON too. Ranks are forked with everything imported (rank_server.py); meeting and the shutdown of
the interpreter still cost half a second a rank. What must be seen of a process from its first import on is not for this: start that one.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from launchers import local
from launchers.local import free_port
from tests.distributed.rank_server import ROOT, Rank, RankServer

SERVERS = 2
"""Neighbouring ranks have different hash seeds."""
_STARTING = threading.Lock()


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The launcher's own, on the CPU with one thread, and with the project importable."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**local.rank_environment(rank, ranks, port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


@functools.cache
def _server(number: int) -> RankServer:
    """Each is started by its first rank, and then serves this process to its end."""
    return RankServer(rank_environment(0, 1, 0))


def start(rank: int, words: list[str], environment: dict[str, str], log: Path) -> Rank:
    with _STARTING:
        server = _server(rank % SERVERS)
    return server.start(words, environment, log)


def run_ranks(target: str, ranks: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Results of `target(*arguments)` by rank. Raises AssertionError with every rank's last lines when one fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        processes: list[Rank] = []
        try:
            for rank in range(ranks):
                words = [target, json.dumps(arguments), f"{folder}/result{rank}.json"]
                processes.append(start(rank, words, rank_environment(rank, ranks, port), logs[rank]))
            if any(process.code(timeout) is None for process in processes):
                timeout = 0  # the time of the first to exceed it is the time of all
            codes = [process.code(timeout) for process in processes]
        finally:
            for process in processes:
                process.end()
        tails = "\n".join(f"--- rank {rank} (code {codes[rank]})\n" + log.read_text()[-3000:] for rank, log in enumerate(logs))
        assert all(code == 0 for code in codes), f"{target} on {ranks} ranks failed (codes {codes})\n{tails}"
        return [json.loads(Path(folder, f"result{rank}.json").read_text()) for rank in range(ranks)]


def be_rank(target: str, arguments: str, result: str) -> None:
    """What a rank does, from its beginning to its end."""
    import torch.distributed as dist

    module, function = target.split(":")
    dist.init_process_group("gloo")
    value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    if dist.is_initialized():  # a target that trains ends the group itself
        dist.barrier()
        dist.destroy_process_group()
