"""The seam between a run's loop and what it trains: language models (pretrain/language.py) or puzzles (pretrain/reasoning/regime.py).

The loop (pretrain/trainer.py) owns the folder, the schedule, the record, the ledger's entries, evaluations and saves at their turn, and
how a run ends. A regime owns data, engine, and what a step and an evaluation are. Every rank makes one, once the run folder is taken
and what could be refused was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from model.cost import Parameters, Work
from pretrain.ledger import Ledger
from pretrain.sections import ScheduleSection

if TYPE_CHECKING:
    from pretrain.checkpoint import Resumed

Beat = Callable[[str], None]
"""Tells the watchdog what was just done."""


@dataclass(frozen=True)
class Stepped:
    """What a step found over all ranks and micro-batches."""

    loss: float
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: the gradients were not finite and the step was skipped."""
    stop: bool
    """Some rank was asked to stop."""
    own_iterations: float
    """Mean solver iterations of this rank's own micro-batches."""
    work: Work
    """A sequence, as measured: what the ledger enters."""
    measured: dict[str, float]
    """Further numbers of the record."""


class Regime(Protocol):
    """What a run trains. Every method is collective: all ranks call it."""

    engine: Any
    ledger: Ledger
    schedule: ScheduleSection
    rate_keys: str
    """The learning rates a user may lower, by their keys."""
    step_tokens: int
    """Tokens of an optimizer step, over all ranks."""
    total_steps: int

    def step(self, *, number: int, stop_requested: bool, beat: Beat) -> Stepped:
        """Takes optimizer step `number` (from 0)."""
        ...

    def evaluate(self, beat: Beat) -> dict[str, Any]:
        """The report of the validation split, with the weights that the engine has now."""
        ...

    def in_words(self, report: dict[str, Any]) -> str:
        """An evaluation in a line."""
        ...

    def parameters(self) -> Parameters: ...

    def tokenizer(self) -> str | None:
        """The text of a tokenizer.json to keep in the run folder."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the data stands, as plain JSON."""
        ...

    def probe(self) -> float:
        """A loss of fixed input: what a checkpoint is known by when it comes back."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """On rank 0, what a checkpoint keeps besides weights and optimizer, by file name."""
        ...

    def resume(self, resumed: Resumed, checkpoint: Path) -> list[str]:
        """Takes back what `position` and `tensors` kept, and compares the probe; sentences worth noting. Raises Refusal."""
        ...
