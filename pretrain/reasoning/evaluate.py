"""Accuracy of a reasoner on puzzles it was not trained on, after given numbers of supervision steps: what training records.

    exact    share of puzzles with every cell right: the published accuracy      standard error sqrt(p (1 - p) / n)
    cells    share of cells right, given ones included
    valid    mazes: the grid is the maze with one shortest path marked, whichever it is
    loss     mean cross-entropy of a cell in nats

All puzzles take all steps, whatever the halting head says (pretrain/reasoning/traces.py); a transformer has one step. Puzzles are dealt
out over the data ranks, and counts are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.puzzles import PuzzleBatch, PuzzleManifest, PuzzleSet, maze_valid_and_shortest
from data_pipeline.puzzles.games import MAZE
from model.reasoning.reasoner import Reasoner
from pretrain.agreement import gather
from pretrain.mesh import ALONE, Mesh
from pretrain.reasoning.traces import Traces, trace


def evaluate(
    model: Any,
    puzzles: PuzzleSet,
    steps: Sequence[int],
    device: torch.device,
    mesh: Mesh = ALONE,
    *,
    batch: int,
    limit: int | None = None,
    iterations: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of at most `limit` puzzles, evenly spread over the set, after each of `steps` (rising). Collective.

    model: a Reasoner in eval mode, or an engine around one. batch: puzzles at a time on this rank. iterations: of every inner loop or
    solve, None as configured. progress: told the share done, after every batch.

    Returns {"puzzles", "loss": {step: nats}, "exact": {...}, "exact_error": {...}, "cells": {...}, "halting_steps": mean step at which the
    halting head says stop (the last where it never does), "evaluations": mean applications of the network a step}; of mazes "valid" and
    "valid_error" too; of a solver, means over all steps, "iterations" a solve and "converged". Steps are text.
    """
    reasoner = reasoner_of(model)
    steps = steps_of(reasoner, steps)
    rows = spread(len(puzzles), limit)
    place, ranks = mesh.where.data, mesh.layout.data
    own = puzzles.batch(rows[place * len(rows) // ranks : (place + 1) * len(rows) // ranks])
    keep = steps if puzzles.manifest.game == MAZE else []
    traces = trace(reasoner, own, steps[-1], device, batch=batch, keep=keep, iterations=iterations, progress=progress)
    told = gather(sums_of(traces, steps, valid_by_step(traces, own, puzzles.manifest)))
    return report_of({key: math.fsum(sums.get(key, 0.0) for sums in told) for key in dict.fromkeys(key for sums in told for key in sums)})


def reasoner_of(model: Any) -> Reasoner:
    """The reasoner itself, out of an engine too: there is nothing to gather in evaluation, ZeRO being at most 1."""
    if isinstance(model, Reasoner):
        return model
    from pretrain.engine import model_of

    reasoner = model_of(model)
    assert isinstance(reasoner, Reasoner)
    return reasoner


def steps_of(model: Reasoner, steps: Sequence[int]) -> list[int]:
    """The steps to report: of a transformer, which carries nothing from one to the next, the first alone."""
    return [1] if model.config.model.kind == "transformer" else list(steps)


def spread(puzzles: int, limit: int | None) -> Tensor:
    """Rows of at most `limit` puzzles, evenly spread: a set may be sorted by source or by difficulty."""
    count = puzzles if limit is None else min(limit, puzzles)
    return torch.arange(count) * puzzles // max(1, count)


def valid_by_step(traces: Traces, puzzles: PuzzleBatch, manifest: PuzzleManifest) -> dict[int, Tensor]:
    """Of mazes, [n] bool by step whose grids were kept: the grid is valid and its path a shortest one. Empty of other games."""
    if manifest.game != MAZE:
        return {}
    inputs = puzzles.inputs.numpy()
    return {
        step: torch.from_numpy(maze_valid_and_shortest(inputs, grids.numpy(), manifest.width)) for step, grids in traces.answers.items()
    }


def sums_of(traces: Traces, steps: Sequence[int], valid: dict[int, Tensor]) -> dict[str, float]:
    """Sums over the puzzles, of what `report_of` makes means of."""
    sums = {"puzzles": float(traces.puzzles), "halting_steps": float(traces.halting_steps().sum())}
    for step in steps:
        for name, table in (("loss", traces.loss), ("exact", traces.exact), ("cells", traces.right)):
            sums[f"{name}/{step}"] = float(table[:, step - 1].sum(dtype=torch.float64))
    sums |= {f"valid/{step}": float(right.sum()) for step, right in valid.items()}
    sums |= {name: traces.puzzles * float(values.mean()) for name, values in traces.record.items()}
    return sums


def report_of(totals: dict[str, float]) -> dict[str, Any]:
    """Means out of the sums over all puzzles of all ranks."""
    puzzles = int(totals["puzzles"])
    report: dict[str, Any] = {"puzzles": puzzles}
    means = {key: value / max(1, puzzles) for key, value in totals.items()}
    for key, mean in means.items():
        name, _, step = key.partition("/")
        if step:
            report.setdefault(name, {})[step] = mean
    for name in ("exact", "valid"):
        if name in report:
            report[f"{name}_error"] = {step: standard_error(share, puzzles) for step, share in report[name].items()}
    named = {"halting_steps": "halting_steps", "solver_evaluations": "evaluations", "solver_iterations": "iterations"}
    named["solver_converged"] = "converged"
    return report | {name: means[key] for key, name in named.items() if key in means}


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / max(1, count))
