"""A rank that stops making progress says where it stands and ends, so that a run that hangs does not hold its machines for ever.

    with Watchdog(600, "rank 3") as watchdog:
        for step in ...:
            watchdog.beat(f"step {step}")

Seconds without a beat -> one paragraph and the stacks of all threads on standard error, multiprocessing children killed, exit code
HUNG. A rank that waits in a collective has made no progress either, so soon every rank speaks; the one whose stack stands elsewhere is
the one the others wait for. A rank that has spoken stays a little, because a launcher ends all others when the first one goes.

Python code cannot run while a C function keeps the interpreter's lock. For that case faulthandler's own timer, which needs no lock,
stands behind: half a period later it dumps the stacks and ends the process with code 1 (its own; it can neither kill children nor say
more). It is armed anew a few times a period by the watching thread, whose running shows that the lock is free.

The watching thread sleeps until the period would be over, so ranks that stopped together speak together, and a beat is one assignment.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import threading
import time
from types import TracebackType

from pretrain.errors import HUNG

_STDERR = 2
_BEHIND = 1.5
"""Periods after which faulthandler's timer ends a process whose interpreter is locked."""
_ARMINGS = 4
"""Times a period that this timer is armed anew."""
_LINGER = 5.0
"""Seconds at most between speaking and ending."""


class Watchdog:
    """A context in which `beat` must be called every `seconds`; `name` says who is watched, such as `rank 3`. One a process."""

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds = seconds
        self.name = name
        self._last = ("starting", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Progress: a new period begins. `doing` completes 'it last reported ...', such as `step 12` or `checkpoint of step 100`."""
        self._last = (doing, time.monotonic())

    def _watch(self) -> None:
        while True:
            doing, since = self._last
            left = since + self.seconds - time.monotonic()
            if left <= 0:
                self._end(doing, since)
            faulthandler.dump_traceback_later(_BEHIND * self.seconds, exit=True, file=_STDERR)
            if self._over.wait(min(left, self.seconds / _ARMINGS)):
                return

    def _end(self, doing: str, since: float) -> None:
        """Speaks and ends the process, also when nobody reads what it says."""
        linger = min(_LINGER, self.seconds / 4)
        try:
            text = self._paragraph(doing, time.monotonic() - since).encode() + b"\n" + _stacks()
            for child in multiprocessing.active_children():
                child.kill()
            threading.Timer(linger, os._exit, (HUNG,)).start()  # in case writing blocks: the reader may hang as well
            with open(_STDERR, "wb", closefd=False) as stderr:
                stderr.write(text)
            time.sleep(linger)
        finally:
            os._exit(HUNG)

    def _paragraph(self, doing: str, seconds: float) -> str:
        return (
            f"error: {self.name} on {socket.gethostname()} has made no progress for {seconds:.0f} s and is ended (exit code {HUNG}). "
            f"It last reported {doing}; where each of its threads stands is below. A stack that ends in a collective (all_reduce, "
            f"all_gather, wait, recv) waits for another rank: look for the rank whose stack stands elsewhere, or which says nothing, and "
            f"at its machine, its disk and the network between. Then go on with --resume. If nothing hangs and the work is that slow, "
            f"raise train.hang_timeout (now {self.seconds:g} s)."
        )


def _stacks() -> bytes:
    """The stacks of all threads. By way of memory: faulthandler keeps the interpreter's lock while it writes, and a pipe may be full."""
    file = os.memfd_create("stacks")
    faulthandler.dump_traceback(file, all_threads=True)
    return os.pread(file, os.fstat(file).st_size, 0)
