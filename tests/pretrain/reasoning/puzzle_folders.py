"""Folders of puzzle runs made by hand: records with known accuracies and costs, and a manifest in the place of puzzles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.puzzles.manifest import PuzzleManifest, PuzzleSplit
from pretrain.config import load_any
from tests.pretrain.run_folders import write_lines

CELLS, BATCH = 16, 8
STEP_TOKENS = BATCH * CELLS
RECIPE = """
regime: reasoning
model: {kind: trm, width: 32, heads: 2, mlp_width: 48, prefix: 1, vocabulary_size: 6, cells: 16}
train: {steps: 100, global_batch: 8, micro_batch: 4, precision: fp32}
evaluation: {every: 10, steps: [1, 4]}
"""


def write_recipe(folder: Path) -> str:
    """A recipe file of a tiny TRM on 4 x 4 Sudokus."""
    file = folder / "tiny.yaml"
    file.write_text(RECIPE)
    return str(file)


def write_puzzle_manifest(folder: Path, *, game: str = "sudoku", validation: str = "a" * 64, training: str = "b" * 64) -> Path:
    """A set of 4 x 4 puzzles that has nothing but its manifest."""
    folder.mkdir(parents=True)
    hashes = {"train": training, "validation": validation}
    splits = {
        name: PuzzleSplit(puzzles=500, bytes=1000, ratings={"largest": 3.0}, rated_by="solver", index_sha256=sha256)
        for name, sha256 in hashes.items()
    }
    box, vocabulary = ((2, 2), 6) if game == "sudoku" else (None, 6)
    (folder / "manifest.json").write_text(PuzzleManifest(game, 4, 4, box, vocabulary, 1, ["here"], splits).to_json())
    return folder


def write_puzzle_run(
    run: Path,
    data: Path,
    exact: Callable[[int], float],
    overrides: Sequence[str] = (),
    *,
    reached: int = 100,
    puzzles: int = 400,
    flops_a_step: float = 1e6,
    seconds_a_step: float = 0.5,
    iterations: float | None = None,
    valid: bool = False,
) -> Path:
    """A run that stopped at `reached` of its 100 steps. After step t it solves the share exact(t) at supervision step 4, half of that at 1;
    of cells it gets (1 + exact) / 2 right. A tenth of its FLOPs is recomputation."""
    run.mkdir(parents=True)
    recipe = load_any(write_recipe(run), [f"data.path={data}", f"run.dir={run}", *overrides])
    (run / "config.yaml").write_text(recipe.to_yaml())
    solver = {"solver_iterations": iterations or 0.0}  # as recorded of a model that solves nothing, too
    write_lines(run / "metrics.jsonl", [_record(step, flops_a_step, seconds_a_step, solver) for step in range(2, reached + 1, 2)])
    told = [_evaluation(step, exact(step), puzzles, valid) for step in range(10, reached + 1, 10)]
    write_lines(run / "evaluations.jsonl", [{**record, **({} if iterations is None else {"iterations": iterations})} for record in told])
    (run / "run.json").write_text(json.dumps({"starts": [{"step": 0}]}))
    return run


def _record(step: int, flops: float, seconds: float, solver: dict[str, float]) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * STEP_TOKENS,
        "loss": 1.0,
        "step_seconds": seconds,
        "flops_total": step * flops,
        "flops_parts": {"recomputation": flops / 10},
        "memory_bytes": 2**30,
        "skipped_steps": 0,
        **solver,
    }


def _evaluation(step: int, exact: float, puzzles: int, valid: bool) -> dict[str, Any]:
    by_step = {"1": exact / 2, "4": exact}
    record: dict[str, Any] = {"step": step, "tokens": step * STEP_TOKENS, "puzzles": puzzles, "loss": {"1": 1.0, "4": 1 - exact}}
    record |= {"exact": by_step, "cells": {key: (1 + share) / 2 for key, share in by_step.items()}}
    return record | ({"valid": {key: min(1.0, share + 0.1) for key, share in by_step.items()}} if valid else {})
