"""Evaluations and seconds of every solver on maps trained for 0, 20, 100 and 250 steps: a table, not a test.

    python -m tests.model.measure

An evaluation is one application of f to every sequence; the count is that of the worst sequence, averaged over batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import SolverConfig
from model.fixed_point import solve
from model.language_model import LanguageModel, build
from tests.model.support import map_and_start, text_batch, text_configuration, train

SOLVERS = {
    "plain": SolverConfig(method="picard"),
    "token, history 1": SolverConfig(history=1),
    "token, history 2": SolverConfig(history=2),
    "token, history 4": SolverConfig(history=4),
    "sequence, history 4": SolverConfig(mixing="sequence", history=4),
}
TOLERANCES = (1e-2, 3e-4, 1e-5)


class Effort(NamedTuple):
    """What one solver needed for one tolerance: evaluations of f until the worst sequence converged, and seconds a solve."""

    evaluations: float
    seconds: float
    converged: float
    fallbacks: float


def effort(maps: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]], solver: SolverConfig) -> Effort:
    """Mean over maps, each a function and its start; no compaction, so that evaluations are those of the worst sequence."""
    solver = replace(solver, compaction=False)
    counts, seconds, shares, fallbacks = [], [], [], []
    for function, start in maps:
        began = time.perf_counter()
        solution = solve(function, start, solver)
        seconds.append(time.perf_counter() - began)
        counts.append(solution.evaluations / start.shape[0])
        shares.append(float(solution.converged.float().mean()))
        fallbacks.append(float(solution.fallbacks))
    return Effort(mean(counts), mean(seconds), mean(shares), mean(fallbacks))


def held_out_maps(model: LanguageModel, batches: int = 4) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    return [map_and_start(model, text_batch(16, 64, seed=-1 - batch)[0]) for batch in range(batches)]


def main() -> None:
    torch.set_num_threads(1)
    model, done = build(text_configuration()), 0
    print("step | solver | " + " | ".join(f"evaluations at {tolerance:g} (ms)" for tolerance in TOLERANCES))
    for steps in (0, 20, 100, 250):
        train(model, done, steps)
        done = steps
        maps = held_out_maps(model)
        for name, solver in SOLVERS.items():
            cells = [effort(maps, replace(solver, tolerance=tolerance)) for tolerance in TOLERANCES]
            print(f"{steps} | {name} | " + " | ".join(f"{cell.evaluations:.2f} ({1e3 * cell.seconds:.1f})" for cell in cells))


if __name__ == "__main__":
    main()
