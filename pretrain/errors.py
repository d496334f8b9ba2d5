"""What ends a command on purpose: a `Refusal` of bad input, or a `RunStopped` with its own exit code. And how they name ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from data_pipeline.errors import Refusal

__all__ = ["BAD_CHECKPOINT_WRITE", "HUNG", "NON_FINITE", "SIGNALLED", "VIOLATED", "Refusal", "RunStopped", "name_ranks"]

SIGNALLED = 3
NON_FINITE = 4
BAD_CHECKPOINT_WRITE = 5
VIOLATED = 6
"""An invariant did not hold: copies of a tensor differed, or ranks that must step together did not (pretrain.invariants)."""
HUNG = 7
"""A rank made no progress for train.hang_timeout and was ended by its own watchdog (pretrain.watchdog)."""

_HOSTS_NAMED = 4


class RunStopped(Exception):
    """A run that had to stop. The message says what happened and how to go on; `code` is the process's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def name_ranks(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """Ranks and where they run, for a message: `rank 3 on b`, `ranks 0-2, 5 on a, b`. hosts: the host of every rank, by rank."""
    numbers = sorted(ranks)
    starts = [number for before, number in pairwise([-2, *numbers]) if number != before + 1]
    stops = [number for number, after in pairwise([*numbers, numbers[-1] + 2]) if number != after - 1]
    spans = [str(start) if start == stop else f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True)]
    places = list(dict.fromkeys(hosts[number] for number in numbers))
    more = f" and {len(places) - _HOSTS_NAMED} more hosts" if len(places) > _HOSTS_NAMED else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(spans)} on {', '.join(places[:_HOSTS_NAMED])}{more}"
