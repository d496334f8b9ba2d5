"""Internalization of a reasoner: how much of its answer the inner solve still makes, and what is there before it.

    T            applications of the network in every inner solve or loop: 0 leaves its state as it is, auto is as configured
    this step    the carried latents are those of auto, and this supervision step alone is cut to T: what it starts from is the proposal
    all steps    every supervision step so far was cut to T: the solver is removed
    agreement    share of cells with the answer that auto gives after as many supervision steps
    distance     ||z* - z0|| / ||z0|| of the reasoning latent over a supervision step (all its solves), mean over puzzles

exact and cells are accuracies against the true answer. A reasoner has internalised its solve when `this step` at T = 0 or 1 is as at auto.
trm and hrm loop so many times instead of solving: their auto is their own count. A Transformer is refused.

Shapes: D depths, auto the last; S steps; sums over puzzles are [2 ways, D, S, 3 figures].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.puzzles import PuzzleBatch
from model.reasoning.reasoner import Reasoner, Thought
from pretrain import durable
from pretrain.errors import Refusal
from pretrain.reasoning.evaluate import spread
from pretrain.reasoning.loaded import load_puzzle_run, puzzle_recipe_of, puzzles_for
from pretrain.reasoning.report import about, asked_of, batch_of
from pretrain.reasoning.traces import starting
from pretrain.run_folder import dump
from pretrain.runtime import device_of, settle_libraries

REPORT, PICTURE = "internalization.json", "internalization.png"
DEPTHS = (0, 1, 2, 4, 8)
WAYS = ("this_step", "all_steps")
FIGURES = ("exact", "cells", "agreement")

logger = logging.getLogger(__name__)


@torch.no_grad()
def batch_sums(
    model: Reasoner, puzzles: PuzzleBatch, steps: int, depths: Sequence[int], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one batch, on the CPU in fp64: sums over its puzzles [2, D, S, 3]; by name [S], the sum of the distance, means of the record."""
    latents = starting(model, puzzles.index, device)
    inputs, identifiers, answers = (part.to(device) for part in (puzzles.inputs, puzzles.identifiers, puzzles.answers))
    cut = [latents] * len(depths)  # of `all steps`
    sums: list[Tensor] = []
    by_step: dict[str, list[Tensor]] = {"distance": []}
    for _ in range(steps):
        whole = model(latents, inputs, identifiers)
        here = [model(latents, inputs, identifiers, depth) for depth in depths]
        along = [model(own, inputs, identifiers, depth) for own, depth in zip(cut, depths, strict=True)]
        grid = whole.logits.argmax(dim=-1)
        sums.append(torch.stack([torch.stack([_figures(one, grid, answers) for one in (*way, whole)]) for way in (here, along)]))
        by_step["distance"].append(_distance(latents[1], whole.latents[1]).sum())
        for name, value in whole.record.items():
            by_step.setdefault(name, []).append(value)
        latents, cut = whole.latents, [one.latents for one in along]
    return torch.stack(sums, dim=2).double().cpu(), {name: torch.stack(values).double().cpu() for name, values in by_step.items()}


def _figures(thought: Thought, auto: Tensor, answers: Tensor) -> Tensor:
    """[3]: sums over the puzzles of FIGURES."""
    grid = thought.logits.argmax(dim=-1)
    right = grid == answers
    return torch.stack([right.all(dim=1).double().sum(), right.double().mean(dim=1).sum(), (grid == auto).double().mean(dim=1).sum()])


def _distance(before: Tensor, after: Tensor) -> Tensor:
    before, after = before.double(), after.double()
    return (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)


def totals(sums: Tensor, by_step: dict[str, Tensor], puzzles: int, depths: Sequence[int]) -> dict[str, Any]:
    """The report's figures out of the sums over all puzzles; by_step: sums over puzzles too."""
    names = [*map(str, depths), "auto"]
    means = (sums / max(1, puzzles)).tolist()
    report: dict[str, Any] = {"puzzles": puzzles, "steps": sums.shape[2]}
    for way, by_depth in zip(WAYS, means, strict=True):
        report[way] = {
            figure: {name: [step[place] for step in by_depth[number]] for number, name in enumerate(names)}
            for place, figure in enumerate(FIGURES)
        }
    shown = {"solver_iterations": "iterations", "solver_converged": "converged", "solver_evaluations": "evaluations"}
    for key, name in {"distance": "distance", **shown}.items():
        if key in by_step:
            report[name] = (by_step[key] / max(1, puzzles)).tolist()
    return report


def report_puzzle_internalization(
    run: Path,
    out: Path,
    *,
    steps: Sequence[int] | None = None,
    depths: Sequence[int] = DEPTHS,
    data: str | None = None,
    puzzles: int | None = None,
    batch: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Of a run's newest whole checkpoint, on at most `puzzles` validation puzzles, up to the last of `steps`; also in
    OUT/internalization.json and .png. Lists in it are by supervision step, from the first.

    Raises Refusal for a Transformer, and as `evaluate_puzzle_run`.
    """
    from pretrain.reasoning.internalization_plot import plot_puzzle_internalization

    recipe = puzzle_recipe_of(run)
    if recipe.model.kind == "transformer":
        raise Refusal(
            f"{run} is a Transformer: it solves nothing, so there is nothing to internalise. Give the run of another kind of model."
        )
    last = asked_of(run, recipe, steps).steps[-1]
    settle_libraries(device_of("auto"))
    puzzle_set = puzzles_for(recipe, data)
    loaded = load_puzzle_run(run)
    rows, depths = spread(len(puzzle_set), puzzles), sorted({0, *depths})
    sums = torch.zeros(len(WAYS), len(depths) + 1, last, len(FIGURES), dtype=torch.float64)
    by_step: dict[str, Tensor] = {}
    parts = rows.split(batch or batch_of(recipe))
    for number, part in enumerate(parts):
        found, figures = batch_sums(loaded.model, puzzle_set.batch(part), last, depths, loaded.device)
        sums += found
        for name, values in figures.items():
            by_step[name] = by_step.get(name, torch.zeros(last)) + (values if name == "distance" else values * len(part))
        progress((number + 1) / len(parts))
    report = about(loaded, puzzle_set, data) | totals(sums, by_step, len(rows), depths)
    report |= {"tolerance": recipe.solver.tolerance} if recipe.model.solves else {}
    report["files"] = [str(out / REPORT), str(out / PICTURE)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        plot_puzzle_internalization(report, out / PICTURE)
        durable.write_atomically(out / REPORT, dump(report, indent=1) + "\n")
    except OSError as error:  # the figures are worth more than their copy
        logger.warning("%s and %s could not be kept in %s: %s", REPORT, PICTURE, out, error.strerror)
        report["files"] = []
    return report
