"""Deep supervision: a batch of running puzzles, one optimizer step a supervision step, finished puzzles replaced (HRM, TRM).

    refill      every halted row takes the next fresh puzzle, the starting latents and the count 0
    supervise   one forward pass; then steps + 1, and
                halted = (steps >= limit, or the halting head says so) and steps >= least_steps
    loss      = mean over rows of (mean cross-entropy of the cells + (BCE(q_halt, right?) + BCE(q_continue, target)) / 2) + penalty

The continue term is there with q_learning alone: its target is the sigmoid of the next step's better logit (at the limit: of its halting
logit), from one more forward pass without gradient. The published code also divides by the global batch, and so does this: a mean over
the rows of a rank.

Exploration is drawn anew at every step, as published: a row that may not halt now may halt at the next.

All cells count, given ones too. Nothing is read back from the device: which rows halt is never known to the host here.
Shapes: b rows, c cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.reasoning.config import SupervisionConfig
from model.reasoning.loss import cross_entropy
from model.reasoning.reasoner import Thought
from model.reasoning.thinking import Latents

Model = Callable[[Latents, Tensor, Tensor], Thought]
"""A reasoner, or an engine around one."""


class Carry(NamedTuple):
    """A batch of puzzles under way."""

    latents: Latents
    inputs: Tensor
    """[b, c] uint8."""
    answers: Tensor
    """[b, c] uint8."""
    identifiers: Tensor
    """[b] int64."""
    steps: Tensor
    """[b] int32: supervision steps taken."""
    halted: Tensor
    """[b] bool: the row is done, and the next refill replaces it."""


class Supervised(NamedTuple):
    """What a supervision step gives."""

    carry: Carry
    loss: Tensor
    record: dict[str, Tensor]
    """Scalars on the device: cross_entropy and halting_loss (means over rows); finished (rows halted now) and sums over those rows:
    finished_cells (share of cells right), finished_exact (whole grid right), finished_halting (halting head right), finished_steps;
    and Thought.record's, the target pass of q_learning included."""


def empty_carry(latents: Latents, cells: int) -> Carry:
    """All rows halted, so that the first refill replaces them: the latents say how many rows and where."""
    rows, device = latents[0].shape[0], latents[0].device
    grids = torch.zeros(rows, cells, dtype=torch.uint8, device=device)
    return Carry(
        latents,
        grids,
        grids.clone(),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.ones(rows, dtype=torch.bool, device=device),
    )


@torch.no_grad()
def refill(carry: Carry, inputs: Tensor, answers: Tensor, identifiers: Tensor, start: Latents) -> Carry:
    """The i-th halted row takes the i-th fresh puzzle: inputs, answers [b, c], identifiers [b], of which those beyond the number of halted
    rows are not looked at. Halted row r takes row r of `start`, whose rows are alike or independent draws. No row is left halted."""
    halted = carry.halted
    place = (halted.cumsum(0) - 1).clamp_min_(0)  # among the halted rows

    def replaced(fresh: Tensor, old: Tensor) -> Tensor:
        return torch.where(_as(halted, old), fresh.to(old.dtype)[place], old)

    return Carry(
        tuple(torch.where(_as(halted, old), new, old) for new, old in zip(start, carry.latents, strict=True)),
        replaced(inputs, carry.inputs),
        replaced(answers, carry.answers),
        replaced(identifiers, carry.identifiers),
        carry.steps.masked_fill(halted, 0),
        torch.zeros_like(halted),
    )


def _as(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


def explore(chances: Tensor, config: SupervisionConfig) -> Tensor:
    """least_steps [b] int32 of one step, from chances [2, b] uniform in [0, 1): of a share `exploration` of the rows uniform in
    2 ... steps, else 0."""
    explores = (chances[0] < config.exploration) & (config.steps > 1)
    return ((2 + (chances[1] * (config.steps - 1)).floor()).clamp_max(config.steps) * explores).int()


def supervise(model: Model, carry: Carry, config: SupervisionConfig, least_steps: Tensor) -> Supervised:
    """One supervision step of a carry without halted rows; least_steps [b] int32 (see `explore`; 0: may halt at once). The loss is
    differentiable where gradients are on; the new carry holds none."""
    thought = model(carry.latents, carry.inputs, carry.identifiers)
    cells = cross_entropy(config.loss, thought.logits, carry.answers).mean()
    with torch.no_grad():
        right = thought.logits.argmax(dim=-1) == carry.answers
        exact = right.all(dim=-1)
        steps = carry.steps + 1
        done = steps >= config.steps
        threshold = thought.q_continue if config.halting == "q_learning" else 0.0
        halted = (done | (thought.q_halt > threshold)) & (steps >= least_steps)
    halting = F.binary_cross_entropy_with_logits(thought.q_halt, exact.to(thought.q_halt.dtype))
    record = dict(thought.record)
    if config.halting == "q_learning":
        target, spent = _continue_target(model, carry, thought, done)
        halting = halting + F.binary_cross_entropy_with_logits(thought.q_continue, target)
        record["solver_evaluations"] = record["solver_evaluations"] + spent
    loss = cells + 0.5 * halting
    if thought.penalty is not None:
        loss = loss + thought.penalty
    record |= {"cross_entropy": cells.detach(), "halting_loss": halting.detach()}
    record |= _finished(halted, right, exact, (thought.q_halt >= 0) == exact, steps)
    return Supervised(carry._replace(latents=thought.latents, steps=steps, halted=halted), loss, record)


@torch.no_grad()
def _continue_target(model: Model, carry: Carry, thought: Thought, done: Tensor) -> tuple[Tensor, Tensor]:
    """The continue logit's target, as a probability [b], and the network's applications it took."""
    following = model(thought.latents, carry.inputs, carry.identifiers)
    better = torch.maximum(following.q_halt, following.q_continue)
    return torch.where(done, following.q_halt, better).sigmoid(), following.record["solver_evaluations"]


@torch.no_grad()
def _finished(halted: Tensor, right: Tensor, exact: Tensor, judged: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Sums over the rows that have just halted."""
    rows = halted.float()
    return {
        "finished": rows.sum(),
        "finished_cells": (rows * right.float().mean(dim=-1)).sum(),
        "finished_exact": (rows * exact).sum(),
        "finished_halting": (rows * judged).sum(),
        "finished_steps": (rows * steps).sum(),
    }
