"""What ends a command on purpose: a `Refusal` of bad input, or a `RunStopped` with its own exit code."""

from __future__ import annotations

from data_pipeline.errors import Refusal

__all__ = ["BAD_CHECKPOINT_WRITE", "NON_FINITE", "SIGNALLED", "Refusal", "RunStopped"]

SIGNALLED = 3
NON_FINITE = 4
BAD_CHECKPOINT_WRITE = 5


class RunStopped(Exception):
    """A run that had to stop. The message says what happened and how to go on; `code` is the process's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
