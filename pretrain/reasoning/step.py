"""One optimizer step: a supervision step of every row under way, micro-batch by micro-batch, through a DeepSpeed engine.

    gradient = d/dw  mean over the global batch of (mean cross-entropy of a row's cells + halting terms) + penalty

The engine takes the mean over micro-batches and ranks, which have equally many rows, so every puzzle weighs the same however the batch is
dealt out. A micro-batch's graph dies with its backward; what goes on is the carry, which has none. All numbers of a step, how many rows
halted among them, travel in one vector: one all-gather and one wait for the device a step beyond the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.reasoning.supervision import supervise
from pretrain.reasoning.running import Running
from pretrain.step import over_ranks, scalar

FINISHED = ("finished", "finished_cells", "finished_exact", "finished_halting", "finished_steps")
"""Sums over the rows that halted in a step; the first is how many."""
_MEANS = ("cross_entropy", "halting_loss", "solver_iterations", "solver_evaluations", "applications", "products", "solver_converged")
_COLUMNS = ("loss", "stop", "solver_fallbacks", "solver_residual", *_MEANS, *FINISHED)


@dataclass(frozen=True)
class PuzzleStep:
    """What a step found over all ranks and micro-batches."""

    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: the gradients were not finite and the step was skipped."""
    stop: bool
    """Some rank was asked to stop."""
    own_iterations: float
    """Mean solver iterations of this rank's own micro-batches."""
    loss: float
    means: dict[str, float]
    """Over micro-batches: cross_entropy, halting_loss, and of a row solver_iterations, solver_evaluations, applications, products,
    solver_converged; the sum of solver_fallbacks and the worst solver_residual."""
    finished: dict[str, float]
    """FINISHED, over the global batch."""


def supervision_step(engine: Any, running: Running, number: int, *, stop_requested: bool) -> PuzzleStep:
    """Optimizer step `number`: refills, then forward and backward of every micro-batch, then the optimizer. All ranks call it."""
    running.refill()
    rows = []
    for own, least in enumerate(running.least_steps(number)):
        rows.append(_micro_step(engine, running, own, least, stop_requested))
    by_rank = over_ranks(torch.stack(rows))
    table = [row for told in by_rank for row in told]
    column = dict(zip(_COLUMNS, zip(*table, strict=True), strict=True))
    running.halted = [round(count) for count in column["finished"]]
    means = {name: sum(column[name]) / len(table) for name in _MEANS}
    own_rows = by_rank[running.mesh.rank]
    return PuzzleStep(
        grad_norm=float(engine.get_global_grad_norm()),
        applied=engine.was_step_applied(),
        stop=any(column["stop"]),
        own_iterations=sum(row[_COLUMNS.index("solver_iterations")] for row in own_rows) / len(own_rows),
        loss=sum(column["loss"]) / len(table),
        means=means | {"solver_fallbacks": sum(column["solver_fallbacks"]), "solver_residual": max(column["solver_residual"])},
        finished={name: sum(column[name]) for name in FINISHED},
    )


def _micro_step(engine: Any, running: Running, own: int, least_steps: Tensor, stop: bool) -> Tensor:
    """One micro-batch; its row of the table."""
    found = supervise(engine, running.carries[own], running.supervision, least_steps)
    running.carries[own] = found.carry
    engine.backward(found.loss)
    engine.step()
    values: dict[str, Any] = {"loss": found.loss.detach(), "stop": stop, **found.record}
    return torch.stack([scalar(values.get(name, 0), found.loss.device) for name in _COLUMNS])
