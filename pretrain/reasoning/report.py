"""`attractor evaluate` of a run on puzzles: accuracy by supervision steps, difficulty, halting, solver iterations and breadth.

    by_iterations    every inner loop or solve of every supervision step cut to T applications. 0 leaves its state as it is: the solver is
                     removed. auto is as configured. `difference` is exact(T) - exact(auto), with the error of the paired difference
    by_breadth       several random starts: pretrain/reasoning/breakdown.py

Figures at one number of steps are those after the last. Refused: what the kind of the model has nothing for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.puzzles import PuzzleBatch, PuzzleSet
from data_pipeline.puzzles.games import MAZE
from pretrain.errors import Refusal
from pretrain.reasoning.breakdown import by_breadth, by_difficulty, halting_report
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.reasoning.evaluate import report_of, spread, standard_error, sums_of, valid_by_step
from pretrain.reasoning.loaded import LoadedPuzzleRun, load_puzzle_run, puzzle_recipe_of, puzzles_for
from pretrain.reasoning.traces import Traces, trace
from pretrain.runtime import device_of, settle_libraries

Iterations = Sequence[int | str]
"""Applications of an inner loop or solve, or "auto" as configured."""
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Asked:
    """What a user asked of a run, with the recipe's own where nothing was said."""

    steps: list[int]
    iterations: list[int | str]
    breadths: list[int]


def asked_of(
    run: Path,
    recipe: PuzzleRecipe,
    steps: Sequence[int] | None = None,
    iterations: Iterations | None = None,
    breadths: Sequence[int] | None = None,
) -> Asked:
    """Sorted and complete. Raises Refusal for what the kind of the model has nothing for."""
    kind, start = recipe.model.kind, recipe.model.start
    if kind == "transformer":
        if steps is not None and list(steps) != [1]:
            raise Refusal(
                f"--steps: {run} is a Transformer, which carries nothing from one supervision step to the next: it has one. Leave it out."
            )
        if iterations is not None:
            raise Refusal(f"--solver-iterations: {run} is a Transformer, which has no inner loop. Leave it out.")
    if breadths is not None and start == "fixed":
        raise Refusal(
            f"--breadth compares random starts, and {run} has one start alone (model.start=fixed): leave it out, or give a run that was "
            f"trained with model.start=random."
        )
    own = [1] if kind == "transformer" else recipe.evaluation.steps
    named: list[int | str] = [*sorted({value for value in iterations if isinstance(value, int)}), "auto"] if iterations else []
    return Asked(sorted(set(steps or own)), named, sorted(set(breadths or [])))


def evaluate_puzzle_run(
    run: Path,
    *,
    steps: Sequence[int] | None = None,
    iterations: Iterations | None = None,
    breadths: Sequence[int] | None = None,
    data: str | None = None,
    puzzles: int | None = None,
    batch: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Evaluates the newest whole checkpoint of a run folder in this process, on at most `puzzles` of the validation puzzles, evenly spread.

    Raises Refusal for a folder without a run on puzzles or without a whole checkpoint, for puzzles of another game or size, and as
    `asked_of`.
    """
    recipe = puzzle_recipe_of(run)
    asked = asked_of(run, recipe, steps, iterations, breadths)
    settle_libraries(device_of("auto"))
    puzzle_set = puzzles_for(recipe, data)
    loaded = load_puzzle_run(run)
    own = puzzle_set.batch(spread(len(puzzle_set), puzzles))
    passes = max([1, *asked.breadths]) + max(0, len(asked.iterations) - 1)
    ask = _Passes(loaded, own, asked.steps[-1], batch, passes, progress)
    traces = ask(keep=asked.steps if puzzle_set.manifest.game == MAZE else [])
    report = about(loaded, puzzle_set, data)
    report |= report_of(sums_of(traces, asked.steps, valid_by_step(traces, own, puzzle_set.manifest)))
    report["by_difficulty"] = by_difficulty(traces, own.ratings, asked.steps)
    if traces.steps > 1:
        report["halting"] = halting_report(traces)
    if asked.iterations:
        cut = {str(count): ask(iterations=count) for count in asked.iterations if isinstance(count, int)}
        report["by_iterations"] = by_iterations({**cut, "auto": traces})
    if asked.breadths:
        several = [traces, *(ask(start=number) for number in range(1, asked.breadths[-1]))]
        report["by_breadth"] = by_breadth(several, asked.breadths, asked.steps)
    return report


def about(loaded: LoadedPuzzleRun, puzzles: PuzzleSet, data: str | None) -> dict[str, Any]:
    """What was evaluated, on what."""
    manifest, recipe = puzzles.manifest, loaded.recipe
    return {
        "run": str(loaded.path),
        "kind": recipe.model.kind,
        "step": loaded.step,
        "weights": loaded.which,
        "data": data or recipe.data.path,
        "game": f"{manifest.game} {manifest.height}x{manifest.width}",
        "trained_steps": recipe.supervision.steps,
    }


class _Passes:
    """Passes of one model over the same puzzles, and how many of them are done."""

    def __init__(
        self, loaded: LoadedPuzzleRun, puzzles: PuzzleBatch, steps: int, batch: int | None, passes: int, progress: Progress
    ) -> None:
        self.loaded, self.puzzles, self.steps, self.passes, self.progress = loaded, puzzles, steps, passes, progress
        self.batch = batch or batch_of(loaded.recipe)
        self.done = 0

    def __call__(self, *, keep: Sequence[int] = (), iterations: int | None = None, start: int = 0) -> Traces:
        found = trace(
            self.loaded.model,
            self.puzzles,
            self.steps,
            self.loaded.device,
            batch=self.batch,
            keep=keep,
            iterations=iterations,
            start=start,
            progress=lambda share: self.progress((self.done + share) / self.passes),
        )
        self.done += 1
        return found


def batch_of(recipe: PuzzleRecipe) -> int:
    """Puzzles at a time."""
    return recipe.evaluation.batch or recipe.train.micro_batch


def by_iterations(traces: dict[str, Traces]) -> list[dict[str, Any]]:
    """After the last step, of each T; auto is among them."""
    auto, found = traces["auto"].exact[:, -1].double(), []
    for name, trace_of in traces.items():
        exact = trace_of.exact[:, -1].double()
        difference, share = exact - auto, float(exact.mean())
        found.append(
            {
                "iterations": name,
                "exact": share,
                "exact_error": standard_error(share, trace_of.puzzles),
                "cells": float(trace_of.right[:, -1].double().mean()),
                "loss": float(trace_of.loss[:, -1].double().mean()),
                "difference": float(difference.mean()),
                "difference_error": float(difference.std(correction=0)) / trace_of.puzzles**0.5,
                "evaluations": float(trace_of.record["solver_evaluations"].mean()),
            }
        )
    return found
