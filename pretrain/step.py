"""One optimizer step: micro-batches through the engine, and what they found gathered from every rank in one collective.

    gradient = d/dw  sum of the losses of all predicted tokens / (global_batch * sequence_length)

so every token weighs the same however the global batch is dealt out to ranks and micro-batches, also where some hold a short, padded
window (a padded position is a token whose loss is 0). The step's numbers, loss, iterations, residual and a request to stop, travel in
one small vector, so a step costs one host synchronisation and one all-gather beyond the engine's own. Where several ranks make one replica,
its last stage's first tensor rank speaks for it.
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
from pretrain.mesh import Mesh

Found = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(loss, targets, record) of one micro-batch."""

_MEANS = ("solver_iterations", "solver_evaluations", "solver_converged", "solver_fallbacks", "products", "applications")
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
    own_iterations: float
    """Mean solver iterations of this rank's own micro-batches: the tensor ranks of a stage must agree on them."""
    solver: dict[str, float] | None
    """Means a sequence: solver_iterations, solver_evaluations (without gradients), applications (with), products, solver_converged,
    solver_fallbacks; and the worst solver_residual. A loop tells the same of its iterations; converged is then
    a sequence whose last one changed the state by less than solver.tolerance."""


def to_device(batch: Batch, device: torch.device, mask_documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, targets, documents or None) on the device."""
    documents = batch.documents.to(device, non_blocking=True) if mask_documents else None
    return batch.tokens.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), documents


def train_step(
    engine: Any, batches: Iterator[Batch], accumulation: int, mesh: Mesh, *, mask_documents: bool, stop_requested: bool
) -> StepResult:
    """Forward and backward over `accumulation` micro-batches, then the optimizer. All ranks call it."""
    run = _pipelined if mesh.layout.pipeline > 1 else _in_turn
    rows = [_row(loss, targets, record, stop_requested) for loss, targets, record in run(engine, batches, accumulation, mask_documents)]
    own = torch.stack(rows) if rows else _no_rows(accumulation, engine.device, stop_requested)
    by_rank = over_ranks(own)
    table = [row for teller in mesh.tellers for row in by_rank[teller]]
    column = dict(zip(_COLUMNS, zip(*table, strict=True), strict=True))
    solver = {name: sum(column[name]) / len(table) for name in _MEANS} | {"solver_residual": max(column["solver_residual"])}
    return StepResult(
        loss=sum(column["nll"]) / max(1.0, sum(column["predicted"])),
        grad_norm=float(engine.get_global_grad_norm()),
        applied=engine.was_step_applied(),
        stop=any(row[_COLUMNS.index("stop")] for told in by_rank for row in told),
        own_iterations=sum(row[_COLUMNS.index("solver_iterations")] for row in by_rank[mesh.rank]) / accumulation,
        solver=solver if any(column["solver_iterations"]) else None,
    )


def _in_turn(engine: Any, batches: Iterator[Batch], accumulation: int, mask_documents: bool) -> Iterator[Found]:
    for _ in range(accumulation):
        tokens, targets, documents = to_device(next(batches), engine.device, mask_documents)
        loss, record = engine(tokens, targets, documents)
        engine.backward(loss * ((targets != IGNORE).sum() / targets.numel()))  # the engine takes the mean over micro-batches and ranks
        engine.step()
        yield loss.detach(), targets, record


def _pipelined(engine: Any, batches: Iterator[Batch], accumulation: int, mask_documents: bool) -> list[Found]:
    from pretrain.stages import feed

    engine.train_batch(feed(engine, batches, mask_documents))
    return engine.module.take_found()


def _row(loss: Tensor, targets: Tensor, record: dict[str, Tensor], stop: bool) -> Tensor:
    predicted = (targets != IGNORE).sum()
    values: dict[str, Any] = {"nll": record.get("cross_entropy", loss) * predicted, "predicted": predicted, "stop": stop, **record}
    return torch.stack([scalar(values.get(name, 0), loss.device) for name in _COLUMNS])


def scalar(value: Any, device: torch.device) -> Tensor:
    """In fp64 on the device. What lies on the host is filled in: a copy would wait for the device."""
    if isinstance(value, Tensor) and value.device == device:
        return value.double()
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _no_rows(accumulation: int, device: torch.device, stop: bool) -> Tensor:
    """What a stage that saw no loss has to say: only whether it was asked to stop."""
    rows = torch.zeros((accumulation, len(_COLUMNS)), dtype=torch.float64, device=device)
    rows[:, _COLUMNS.index("stop")] = stop
    return rows


def over_ranks(rows: Tensor) -> list[list[list[float]]]:
    """The rows of every rank, by rank, read back to the host."""
    if world_size() == 1:
        return [rows.tolist()]
    everyone = rows.new_empty((world_size() * rows.shape[0], rows.shape[1]))
    dist.all_gather_into_tensor(everyone, rows)
    return everyone.unflatten(0, (world_size(), -1)).tolist()
