"""`--procs N`: N ranks of one run on this machine, started, watched and ended together.

    launch(["pretrain/train.py", "demo"], 2) -> exit code of the run
    launch(..., 8, Place(node=1, nodes=4, address="node-0", port=29500))        this machine's share of a run on four

- SIGTERM, SIGUSR1 and SIGINT are passed on to every rank, which then saves or stops; a second one ends them at once.
- The first rank to fail decides the exit code; the others get SIGTERM and, seconds later, SIGKILL. Ranks that stop on
  purpose (codes 3, 4, 5) agreed to, so the others get time to finish what they are writing.
- Each rank leads its own process group, so that its loader processes end with it, and dies with this process (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from pretrain.errors import BAD_CHECKPOINT_WRITE, HUNG, NON_FINITE, SIGNALLED, VIOLATED

INTERRUPTED = 130
_POLL = 0.05
_GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_AGREED = dict.fromkeys((SIGNALLED, NON_FINITE, BAD_CHECKPOINT_WRITE, VIOLATED, HUNG), 30.0)
"""Seconds the other ranks get after a rank stopped on purpose, before SIGTERM."""
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """This machine in a run over several, each started by itself (a pod of a Kubernetes job, say) with as many ranks as the others."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    """Of node 0, where rank 0 listens for the others."""
    port: int | None = None
    """There; None takes a free one, which only a run of one machine can."""


ALONE = Place()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int, place: Place = ALONE) -> dict[str, str]:
    """The variables by which torch.distributed, DeepSpeed and streaming know rank `rank` of this machine's; threads share the cores."""
    cores = len(os.sched_getaffinity(0))
    return {
        **os.environ,
        "RANK": str(place.node * ranks + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(place.nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks))),
    }


def launch(arguments: Sequence[str], ranks: int, place: Place = ALONE) -> int:
    """Runs `python *arguments` as `ranks` local ranks; returns 0, or the code of the first rank to fail (128 + n for signal n)."""
    port = place.port or free_port()
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int) -> None:
        for process in processes:
            _send(process, number)

    with noting_signals(pass_on) as received:
        try:
            for rank in range(ranks):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env=rank_environment(rank, ranks, port, place),
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
            return _watch(processes, received)
        finally:
            _end(processes)


@contextlib.contextmanager
def noting_signals(act: Callable[[int], None] = lambda number: None) -> Iterator[list[int]]:
    """Keeps the signals of PASSED_ON from ending this process meanwhile: yields the list of those received, and does `act` at each."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        act(number)

    before = {number: signal.signal(number, note) for number in PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Waits until all ranks are done, or one has failed and the others had their time."""
    failed: int | None = None
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((code for code in codes if code), None)
            if failed is not None:
                deadline = time.monotonic() + _AGREED.get(failed, 0.0)
        if all(code is not None for code in codes) or time.monotonic() >= deadline:
            break
        if received.count(signal.SIGINT) + received.count(signal.SIGTERM) > 1:
            break
        if signal.SIGINT in received:
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(_POLL)
    if signal.SIGINT in received and failed != SIGNALLED:
        return INTERRUPTED
    if failed is None:
        return 128 + received[-1] if any(code is None for code in codes) else 0
    return failed if failed > 0 else 128 - failed


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs: SIGTERM, a grace, SIGKILL to whole groups (loader processes too)."""
    for process in processes:
        if process.poll() is None:
            _send(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to one rank, which alone knows how its loader processes end."""
    if process.poll() is None:
        process.send_signal(number)
