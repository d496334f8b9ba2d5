"""One optimizer step: micro-batches through the engine, and what they found gathered from every rank in one collective.

    gradient = d/dw  sum of the losses of all predicted tokens / (global_batch * sequence_length)

so every token weighs the same however the global batch is dealt out to ranks and micro-batches, also where some hold a short, padded
window (a padded position is a token whose loss is 0). The step's numbers, loss, iterations, residual and a request to stop, travel in
one small vector, so a step costs one host synchronisation and one all-gather beyond the engine's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import Batch
from model.loss import IGNORE
from pretrain.agreement import world_size

_MEANS = ("solver_iterations", "solver_evaluations", "solver_converged", "solver_fallbacks", "products")
_SUMS = ("nll", "predicted", "stop")
_COLUMNS = (*_SUMS, *_MEANS, "solver_residual")


@dataclass(frozen=True)
class StepResult:
    """What a step found over all ranks and micro-batches. Solver numbers are None for a model with nothing to solve."""

    loss: float
    """Mean cross-entropy a predicted token, in nats."""
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: the gradients were not finite and the step was skipped."""
    stop: bool
    """Some rank was asked to stop."""
    solver: dict[str, float] | None
    """solver_iterations, solver_evaluations, solver_converged (means a sequence), solver_fallbacks, products, solver_residual (worst)."""


def to_device(batch: Batch, device: torch.device, mask_documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, targets, documents or None) on the device."""
    documents = batch.documents.to(device, non_blocking=True) if mask_documents else None
    return batch.tokens.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), documents


def train_step(engine: Any, batches: Iterator[Batch], accumulation: int, *, mask_documents: bool, stop_requested: bool) -> StepResult:
    """Forward and backward over `accumulation` micro-batches, then the optimizer. All ranks call it."""
    rows = []
    solved = False
    for _ in range(accumulation):
        tokens, targets, documents = to_device(next(batches), engine.device, mask_documents)
        loss, record = engine(tokens, targets, documents)
        predicted = (targets != IGNORE).sum()
        engine.backward(loss * (predicted / targets.numel()))  # the engine takes the mean over micro-batches and ranks
        engine.step()
        solved = "solver_iterations" in record
        rows.append(_row(loss, record, predicted, stop_requested))
    table = _over_ranks(torch.stack(rows))
    column = dict(zip(_COLUMNS, zip(*table, strict=True), strict=True))
    solver = {name: sum(column[name]) / len(table) for name in _MEANS} | {"solver_residual": max(column["solver_residual"])}
    return StepResult(
        loss=sum(column["nll"]) / max(1.0, sum(column["predicted"])),
        grad_norm=float(engine.get_global_grad_norm()),
        applied=engine.was_step_applied(),
        stop=any(column["stop"]),
        solver=solver if solved else None,
    )


def _row(loss: Tensor, record: dict[str, Tensor], predicted: Tensor, stop: bool) -> Tensor:
    values: dict[str, Any] = {"nll": record.get("cross_entropy", loss.detach()) * predicted, "predicted": predicted, "stop": stop, **record}
    return torch.stack([torch.as_tensor(values.get(name, 0), dtype=torch.float64).to(loss.device) for name in _COLUMNS])


def _over_ranks(rows: Tensor) -> list[list[float]]:
    """The rows of every rank, read back to the host."""
    if world_size() == 1:
        return rows.tolist()
    everyone = rows.new_empty((world_size() * rows.shape[0], rows.shape[1]))
    dist.all_gather_into_tensor(everyone, rows)
    return everyone.tolist()
