"""A polite end: SIGTERM (schedulers, `kill`) and SIGUSR1 (Slurm's warning before the time limit) ask the run to save and stop.

The handler only notes the signal. A signal may reach one rank alone, or two in different steps, and all must save the same one: the note
travels with the numbers of each step (pretrain/step.py), and a run stops once any rank's has arrived. Ctrl-C is left alone: it
interrupts, and the last checkpoint stands.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the signals set `requested`; the handlers of before come back at its end. Main thread only (Python's rule)."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned it also takes
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
