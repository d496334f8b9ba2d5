"""Forks ranks from a process that has imported everything already: 7 s of CPU time are spent once, not once a rank.

    server = RankServer()
    rank = server.start(["package.module:function", arguments, result], environment, log)
    rank.code(seconds)      as subprocess gives it; None when it still runs after so many seconds
    rank.end()              kills it if it still runs

    pytest ── control ──> server ── fork ──> keeper ── fork ──> rank: its environment, its log on fd 1 and 2, nothing on fd 0
       └──────────── connection ──────────────┘

A rank begins as a new process would: environment and random seeds are its own, Python has no other thread, and there is no process group.
It ends through the interpreter's shutdown, where libraries may still fail. What forks of one process do share is its hash seed, and with
it the order of sets, on which ranks must not rely: so neighbours are to come from two servers.
A keeper tells its rank's exit code, and kills it when the connection closes: nothing outlives the process that asked.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("deepspeed", "megatron.core", "streaming", "pretrain.trainer", "pretrain.engine", "pretrain.checkpoint", "pytest")
PRELOADED += ("deepspeed.runtime.zero.muon.muon_optimizer",)  # which every engine imports
_KILLED_WITHIN = 30.0
"""Seconds."""


class RankServer:
    """Starts the server, whose own environment is `environment`; any thread may ask it for ranks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server)
        command = [sys.executable, "-m", "tests.distributed.rank_server", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )

    def start(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """A new rank. What it is told may be long, and goes by a file beside its log."""
        request = log.with_suffix(".request")
        log.touch()  # there even if the rank never begins
        request.write_text(json.dumps({"words": list(words), "environment": dict(environment), "log": str(log)}))
        mine, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [os.fsencode(request)], [theirs.fileno()])
        return Rank(mine, self)

    def said(self) -> str:
        """What the server itself said last."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]


class Rank:
    """A rank as the process that asked for it sees it."""

    def __init__(self, connection: socket.socket, server: RankServer) -> None:
        self._connection, self._server = connection, server
        self._code: int | None = None

    def code(self, seconds: float) -> int | None:
        """The exit code, -n for one that signal n killed; None when the rank still runs after so many seconds.

        Raises AssertionError when its keeper is gone.
        """
        if self._code is None:
            self._connection.settimeout(seconds)
            try:
                told = self._connection.recv(16)
            except (TimeoutError, BlockingIOError):
                return None
            assert told, f"the server of ranks is gone; it said:\n{self._server.said()}"
            self._code = int(told)
        return self._code

    def end(self) -> None:
        """Kills the rank if it still runs, and waits until it is gone."""
        with self._connection:
            if self._code is None:
                self._connection.shutdown(socket.SHUT_WR)
                self.code(_KILLED_WITHIN)


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Returns in every rank its request; and in the server None, when nobody is left to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends the ranks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave nothing behind
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            return None
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            rank = os.fork()
            if rank == 0:
                connection.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return dict(json.loads(Path(os.fsdecode(message)).read_text()))
            _keep(rank, connection)
        connection.close()


def _keep(rank: int, connection: socket.socket) -> None:
    """Waits for the rank to end, or for the other side to be done with it; does not return."""
    ended = os.pidfd_open(rank)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(rank, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    try:
        connection.send(str(code).encode())
    finally:  # the other side may be gone
        os._exit(0)


def _become(request: dict[str, Any]) -> list[str]:
    """Makes this fork the process that was asked for; returns its words."""
    import numpy as np
    import torch

    os.environ.clear()
    os.environ.update(request["environment"])
    with open(os.devnull, "rb") as nothing, open(request["log"], "ab") as log:
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source.fileno(), target)
    np.random.seed()  # a new process draws seeds of its own, as `random` does at a fork
    torch.default_generator.seed()
    return list(request["words"])


def _main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in a rank neither look at nor copy what was imported
    request = _serve(control)
    if request is not None:
        from tests.distributed.ranks import be_rank

        be_rank(*_become(request))


if __name__ == "__main__":
    _main()
