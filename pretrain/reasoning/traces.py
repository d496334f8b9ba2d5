"""What a reasoner does with puzzles, supervision step by supervision step, as tables of figures by puzzle and step.

Every puzzle takes all the steps, as in the published evaluations: nothing halts it, and what the halting head says is one of the figures.
So one pass answers every question about fewer steps. The network runs without gradient; a batch is read back from the device once.

A random start (model.start=random) depends on the puzzle's row of its split and the number of the start alone, so a figure does not depend
on the batch size, on the ranks or on which other puzzles are evaluated.

Shapes: n puzzles, S steps, c cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.puzzles import PuzzleBatch
from model.reasoning.loss import cross_entropy
from model.reasoning.reasoner import Reasoner, Thought
from model.reasoning.thinking import Latents

_FIGURES = 4  # of a puzzle and step: loss, cells right, stop, residual


@dataclass(frozen=True)
class Traces:
    """Of n puzzles over S supervision steps, on the CPU."""

    loss: Tensor
    """[n, S] fp32: mean cross-entropy of the puzzle's cells in nats, by the recipe's supervision.loss."""
    right: Tensor
    """[n, S] fp32: share of the puzzle's cells that are right."""
    exact: Tensor
    """[n, S] bool: all of them are."""
    stop: Tensor
    """[n, S] bool: the halting head says that the puzzle is done."""
    residual: Tensor
    """[n, S] fp32: ||new - old|| / ||new|| of the latents over the step."""
    answers: dict[int, Tensor]
    """[n, c] uint8: the predicted grids after the steps that were asked for, from 1."""
    record: dict[str, Tensor]
    """[S] fp64, by name of Thought.record: means over the puzzles."""

    @property
    def puzzles(self) -> int:
        return len(self.exact)

    @property
    def steps(self) -> int:
        return self.exact.shape[1]

    def halting_steps(self) -> Tensor:
        """[n] int64: the first step at which the halting head says stop; S where it never does."""
        first = torch.where(self.stop.any(dim=1), self.stop.int().argmax(dim=1) + 1, self.steps)
        return first.long()


def starting(model: Reasoner, index: Tensor, device: torch.device, start: int = 0) -> Latents:
    """The first latents of the puzzles with these rows of their split [b] (on the CPU); start: which of the random ones."""
    if model.config.model.start == "fixed":
        return model.start(len(index))
    seeds = [int(np.random.SeedSequence((start, row)).generate_state(1)[0]) for row in index.tolist()]  # torch's CPU takes 32 bits
    drawn = [model.start(1, torch.Generator(device).manual_seed(seed)) for seed in seeds]
    return tuple(torch.cat(rows) for rows in zip(*drawn, strict=True))


@torch.no_grad()
def thoughts(
    model: Reasoner, puzzles: PuzzleBatch, steps: int, device: torch.device, *, iterations: int | None = None, start: int = 0
) -> Iterator[Thought]:
    """What each of `steps` supervision steps makes of the puzzles, from the start on. Nothing is read back."""
    latents = starting(model, puzzles.index, device, start)
    inputs, identifiers = puzzles.inputs.to(device), puzzles.identifiers.to(device)
    for _ in range(steps):
        thought = model(latents, inputs, identifiers, iterations)
        latents = thought.latents
        yield thought


def says_stop(model: Reasoner, thought: Thought) -> Tensor:
    """[b] bool: the halting head takes the puzzle for done, by the rule the model was trained with."""
    threshold = thought.q_continue if model.config.supervision.halting == "q_learning" else 0.0
    return thought.q_halt > threshold


def trace(
    model: Reasoner,
    puzzles: PuzzleBatch,
    steps: int,
    device: torch.device,
    *,
    batch: int,
    keep: Sequence[int] = (),
    iterations: int | None = None,
    start: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Traces:
    """Takes all the puzzles through `steps` supervision steps, at most `batch` at a time. The model is in eval mode.

    keep: steps (from 1) whose predicted grids are wanted. iterations: of every inner loop or solve, None as configured. start: which of
    the random starts. Batches are of one size, so that a compiled model sees one shape: the last may repeat a puzzle, which counts only
    in the means of the record.
    """
    total, cells = len(puzzles.index), puzzles.inputs.shape[1]
    count = math.ceil(total / batch)
    size = math.ceil(total / count) if count else 0
    figures = [torch.empty(0, _FIGURES, steps)]
    grids = {step: [torch.empty(0, cells, dtype=torch.uint8)] for step in keep}
    records: list[dict[str, Tensor]] = []
    for number in range(count):
        rows = torch.arange(number * size, (number + 1) * size).clamp_max(total - 1)
        real = min(size, total - number * size)
        part = PuzzleBatch(*(column[rows] for column in puzzles))
        found, answers, record = _batch(model, part, thoughts(model, part, steps, device, iterations=iterations, start=start), keep)
        figures.append(found.cpu()[:real])
        for step, predicted in answers.items():
            grids[step].append(predicted.cpu()[:real])
        records.append(dict(zip(record, torch.stack(list(record.values())).double().cpu(), strict=True)))
        progress((number + 1) / count)
    loss, right, stop, residual = torch.cat(figures).unbind(dim=1)
    return Traces(
        loss=loss,
        right=right / cells,
        exact=right == cells,
        stop=stop > 0,
        residual=residual,
        answers={step: torch.cat(parts) for step, parts in grids.items()},
        record={name: torch.stack([record[name] for record in records]).mean(dim=0) for name in (records[0] if records else {})},
    )


@torch.no_grad()
def _batch(
    model: Reasoner, puzzles: PuzzleBatch, taken: Iterator[Thought], keep: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor]]:
    """(figures [b, 4, S], grids by step, record [S] by name), all on the device."""
    figures: list[Tensor] = []
    grids: dict[int, Tensor] = {}
    record: dict[str, list[Tensor]] = {}
    answers: Tensor | None = None
    for step, thought in enumerate(taken, 1):
        if answers is None:
            answers = puzzles.answers.to(thought.logits.device)
        predicted = thought.logits.argmax(dim=-1).to(torch.uint8)
        loss = cross_entropy(model.config.supervision.loss, thought.logits, answers).mean(dim=1)
        right = (predicted == answers).sum(dim=1)
        figures.append(torch.stack([loss.float(), right.float(), says_stop(model, thought).float(), thought.residual], dim=1))
        if step in keep:
            grids[step] = predicted
        for name, value in thought.record.items():
            record.setdefault(name, []).append(value.double())
    return torch.stack(figures, dim=-1), grids, {name: torch.stack(values) for name, values in record.items()}
