"""What a puzzle recipe costs, before anything starts: parameters, FLOPs, memory and batch arithmetic, in closed form. No torch.

    PuzzlePlan = parameters by kind
               + FLOPs a puzzle of one supervision step at 0, 1, 2, 4, 8 and the expected solver iterations (model/reasoning/cost.py)
               + the parts of a training step
               + bytes on a rank under ZeRO 0 and 1 (model/reasoning/memory.py)
               + puzzles a step, accumulation, steps, FLOPs of the whole run

Sizes that the recipe leaves to the data (vocabulary, cells) are read from its manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from model.cost import Work
from model.reasoning.config import ReasoningConfig
from model.reasoning.cost import count_reasoner, planned_work, reasoner_flops
from model.reasoning.memory import ReasonerMemory, reasoner_memory
from pretrain.errors import Refusal
from pretrain.layout import layout_on
from pretrain.reasoning.config import PuzzleRecipe

ITERATIONS = (0, 1, 2, 4, 8)
ZERO = (0, 1)


@dataclass(frozen=True)
class PuzzleFlopsRow:
    """One supervision step at one number of solver iterations a solve (None: a model with nothing to solve). FLOPs are a puzzle's."""

    iterations: float | None
    evaluations: float
    """Applications of the network without gradient, in training."""
    applications: float
    """And with."""
    inference: float
    training: float
    hardware: float
    step: float
    """Training, of an optimizer step: all puzzles under way."""
    parts: dict[str, float]


@dataclass(frozen=True)
class PuzzlePlan:
    """Everything `attractor plan` says of a puzzle recipe. Memory is bytes on one rank."""

    recipe: str
    kind: str
    vocabulary_size: int
    cells: int
    positions: int
    """Cells and the prefix: what the network sees."""
    precision: str
    parameters: dict[str, int]
    flops: list[PuzzleFlopsRow]
    expected_iterations: float | None
    supervision_steps: int
    """A puzzle stays at most, in training."""
    gpus: int
    batch: dict[str, int]
    run_flops: float
    zero: int
    memory: dict[str, dict[str, float]]
    """By ZeRO stage."""

    @property
    def expected(self) -> PuzzleFlopsRow:
        return next(row for row in self.flops if row.iterations == self.expected_iterations)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of --json."""
        return asdict(self)


def complete_puzzles(recipe: PuzzleRecipe) -> PuzzleRecipe:
    """The recipe with vocabulary and cells stated, from its data where it names some. Raises Refusal where neither says them."""
    open_sizes = [f"model.{key}" for key in ("vocabulary_size", "cells") if getattr(recipe.model, key) is None]
    if recipe.data.path is None:
        if not open_sizes:
            return recipe
        raise Refusal(
            f"{' and '.join(open_sizes)} {'is' if len(open_sizes) == 1 else 'are'} left to the prepared puzzles in the recipe "
            f"{recipe.run.name!r}, but data.path names none: add data.path=DIR, or state {'it' if len(open_sizes) == 1 else 'them'} (of a "
            "9x9 Sudoku model.vocabulary_size=11 model.cells=81, of a 30x30 maze 6 and 900)."
        )
    from data_pipeline.puzzles import open_puzzles

    manifest = open_puzzles(recipe.data.path, recipe.data.cache)
    return recipe.completed(manifest.vocabulary_size, manifest.cells, manifest.identifiers, recipe.data.path)


def make_puzzle_plan(recipe: PuzzleRecipe, gpus: int | None = None) -> PuzzlePlan:
    """The plan of a recipe on `gpus` ranks (None: one). Raises Refusal where the batch does not divide over them."""
    layout = layout_on(recipe.layout, gpus or 1)
    accumulation = recipe.check_world(layout.data)
    recipe = complete_puzzles(recipe)
    architecture, train = recipe.architecture, recipe.train
    assert recipe.model.vocabulary_size is not None
    expected = recipe.solver.expected_iterations if recipe.model.solves else None
    counts = [None] if expected is None else sorted({*map(float, ITERATIONS), expected})
    return PuzzlePlan(
        recipe=recipe.run.name,
        kind=recipe.model.kind,
        vocabulary_size=recipe.model.vocabulary_size,
        cells=recipe.cells,
        positions=recipe.model.length,
        precision=train.precision,
        parameters=asdict(count_reasoner(architecture)),
        flops=[_row(recipe, count) for count in counts],
        expected_iterations=expected,
        supervision_steps=recipe.supervision.steps,
        gpus=layout.data,
        batch={
            "data_ranks": layout.data,
            "micro_batch": train.micro_batch,
            "accumulation": accumulation,
            "global_batch": train.global_batch,
            "cells_per_step": train.global_batch * recipe.cells,
            "steps": train.steps,
            "puzzle_steps": train.steps * train.global_batch,
            "cells": train.steps * train.global_batch * recipe.cells,
        },
        run_flops=puzzle_run_flops(recipe),
        zero=recipe.layout.zero,
        memory={str(zero): _bytes(puzzle_memory(recipe, layout.data, zero)) for zero in ZERO},
    )


def puzzle_memory(recipe: PuzzleRecipe, data_ranks: int, zero: int) -> ReasonerMemory:
    """Bytes on one of so many ranks."""
    return reasoner_memory(
        recipe.architecture,
        recipe.train.global_batch // data_ranks,
        recipe.train.micro_batch,
        bytes_per_value=2 if recipe.train.precision == "bf16" else 4,
        zero=zero,
        data_ranks=data_ranks,
        average=recipe.optimizer.ema is not None,
    )


def puzzle_run_flops(recipe: PuzzleRecipe) -> float:
    """Model FLOPs of the whole run at the expected iterations; the recipe must be complete."""
    config, train = recipe.architecture, recipe.train
    return reasoner_flops(config, planned_work(config)).model * train.steps * train.global_batch * recipe.cells


def _row(recipe: PuzzleRecipe, iterations: float | None) -> PuzzleFlopsRow:
    config = recipe.architecture
    if iterations is not None:
        config = replace(config, solver=replace(config.solver, expected_iterations=iterations))
    work, cells = planned_work(config), recipe.cells
    training = reasoner_flops(config, work)
    return PuzzleFlopsRow(
        iterations=iterations,
        evaluations=work.evaluations,
        applications=work.applications,
        inference=cells * _inference(config),
        training=cells * training.model,
        hardware=cells * training.hardware,
        step=cells * training.model * recipe.train.global_batch,
        parts={part: cells * value for part, value in asdict(training).items()},
    )


def _inference(config: ReasoningConfig) -> float:
    """FLOPs a cell of one supervision step without gradient: all applications, one pass of the heads, no target pass."""
    config = replace(config, supervision=replace(config.supervision, halting="halt"))
    work = planned_work(config)
    forward = reasoner_flops(config, Work(work.evaluations + work.applications, 0.0, 0.0))
    return forward.solve + forward.head_forward


def _bytes(parts: ReasonerMemory) -> dict[str, float]:
    return {**asdict(parts), "total": parts.total}
