"""Runs on puzzles side by side: what each recipe reached over its seeds, what that cost, and what is matched and what is not. No torch.

    records -> refuse what cannot be compared -> arms (runs that differ in train.seed alone) -> DIR/compare.{json,md}, DIR/*.png

Figures are those that training recorded: accuracy on the validation puzzles at the last supervision step, with the averaged weights
where the recipe keeps them. Nothing is evaluated again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import VALIDATION
from pretrain.compare_records import make_folder
from pretrain.compare_report import MATCHED
from pretrain.durable import write_atomically
from pretrain.errors import Refusal
from pretrain.reasoning.compare_arms import Arm, make_arms, spread
from pretrain.reasoning.compare_plots import plot_puzzles
from pretrain.reasoning.compare_records import PuzzleRun, own, read_puzzle_run, refuse_unlike_puzzles
from pretrain.reasoning.compare_report import findings, markdown

REPORT, DOCUMENT = "compare.md", "compare.json"
ACCURACY = 0.5
"""Share of puzzles solved, the steps to which are told."""
_TAIL = 0.1  # of a run: over which iterations in training are averaged


def compare_puzzle_runs(runs: Sequence[Path], out: Path, *, accuracy: float = ACCURACY) -> dict[str, Any]:
    """Compares run folders of puzzles and writes compare.md, compare.json and the plots into the folder `out`; returns the document.

    accuracy: the share of puzzles solved, the first evaluation at or above which is told.

    Raises Refusal, before anything is written, for fewer than two runs, one given twice, two with the same settings and seed, folders
    without a run or an evaluation, other games or validation puzzles, and an `out` that is a file.
    """
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file. Give a folder; it is made where there is none.")
    if not 0 < accuracy <= 1:
        raise Refusal(f"--accuracy {accuracy:g} is a share of puzzles: give a number above 0 and up to 1, such as 0.5.")
    if len(runs) < 2:
        raise Refusal(f"A comparison needs at least two runs, not {len(runs)}: give two run folders or more.")
    whole = [path.resolve() for path in runs]
    if twice := next((path for path in whole if whole.count(path) > 1), None):
        raise Refusal(f"The run {twice} is given twice: it has nothing to be compared with but itself. Give each folder once.")
    records = [read_puzzle_run(path, path.name) for path in runs]
    refuse_unlike_puzzles(records)
    arms = make_arms(records)
    make_folder(out)
    told = {arm.name: [_describe(run, arm.name, accuracy) for run in arm.runs] for arm in arms}
    document: dict[str, Any] = {
        "regime": "reasoning",
        "data": _data(records),
        "accuracy": accuracy,
        "arms": [_summarise(arm, told[arm.name]) for arm in arms],
        "runs": [run for arm in arms for run in told[arm.name]],
    }
    document["matched"] = [_matched(arm, document["arms"][0]) for arm in document["arms"][1:]]
    document["plots"] = plot_puzzles(arms, out, f"{records[0].evaluated_puzzles:,} validation puzzles ({records[0].game})")
    document["findings"] = findings(document)
    write_atomically(out / DOCUMENT, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomically(out / REPORT, markdown(document))
    return document


def _data(runs: Sequence[PuzzleRun]) -> dict[str, Any]:
    manifest = runs[0].manifest
    return {
        "game": runs[0].game,
        "validation_index_sha256": runs[0].validation_sha256,
        "validation_puzzles": manifest.splits[VALIDATION].puzzles,
        "evaluated_puzzles": runs[0].evaluated_puzzles,
        "training_sets": len({run.training_sha256 for run in runs}),
    }


def _describe(run: PuzzleRun, arm: str, accuracy: float) -> dict[str, Any]:
    last, curve = run.evaluations[-1], run.accuracy
    best = int(np.argmax(curve.exact))
    return {
        "arm": arm,
        "run": str(run.path),
        "seed": run.recipe.train.seed,
        "step": run.step,
        "total_steps": run.total_steps,
        "finished": run.finished,
        "evaluated_at": last["step"],
        "supervision_steps": int(list(last["exact"])[-1]),
        **{key: own(last, key) for key in ("exact", "cells", "valid", "loss")},
        "by_step": last["exact"],
        "best": {"exact": float(curve.exact[best]), "step": int(curve.steps[best])},
        "reached": _reached(run, accuracy),
        "iterations": {"evaluation": last.get("iterations"), "training": _iterations(run)},
        "tokens": run.metrics[-1]["tokens"],
        "puzzle_steps": run.step * run.recipe.train.global_batch,
        "flops": run.flops(),
        "seconds": run.seconds,
        "memory_bytes": max(record["memory_bytes"] for record in run.metrics),
        "skipped_steps": run.metrics[-1]["skipped_steps"],
        "parameters": run.parameters(),
    }


def _reached(run: PuzzleRun, accuracy: float) -> dict[str, float] | None:
    """The first evaluation that solves so many; None where none does."""
    curve = run.accuracy
    there = np.flatnonzero(curve.exact >= accuracy)
    if not len(there):
        return None
    at = int(there[0])
    return {"step": int(curve.steps[at]), "flops": float(curve.flops[at]), "seconds": float(curve.seconds[at])}


def _iterations(run: PuzzleRun) -> float | None:
    """Of a solve in training: mean over the records of the last tenth. None where nothing is solved."""
    tokens, iterations = run.series("solver_iterations")
    if not run.recipe.model.solves or not len(tokens):
        return None
    return float(np.mean(iterations[tokens > (1 - _TAIL) * tokens[-1]]))


def _summarise(arm: Arm, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An arm's figures: spreads over its seeds. Those of an evaluation or a solver are None where no run has them."""
    first = runs[0]
    reached = [run["reached"] for run in runs if run["reached"] is not None]
    return {
        "name": arm.name,
        "kind": arm.kind,
        "seeds": arm.seeds,
        "unfinished": sum(not run["finished"] for run in runs),
        "parameters": first["parameters"],
        "supervision_steps": first["supervision_steps"],
        **{key: _over([run[key] for run in runs]) for key in ("exact", "cells", "valid", "loss")},
        "by_step": {step: spread([run["by_step"][step] for run in runs]) for step in first["by_step"]},
        "best": spread([run["best"]["exact"] for run in runs]),
        "reached": {"runs": len(reached), **{key: _over([told[key] for told in reached]) for key in ("step", "flops", "seconds")}},
        "iterations": {key: _over([run["iterations"][key] for run in runs]) for key in ("evaluation", "training")},
        **{key: spread([run[key] for run in runs]) for key in ("step", "tokens", "puzzle_steps", "seconds", "memory_bytes")},
        "flops": {key: spread([run["flops"][key] for run in runs]) for key in ("hardware", "model")},
    }


def _over(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The spread of the values there are."""
    told = [value for value in values if value is not None]
    return spread(told) if told else None


def _matched(arm: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """What an arm spent over what the first did (means over seeds), and whether they agree; and by how much it is more accurate."""
    mine, its = _quantities(arm), _quantities(first)
    return {
        "arm": arm["name"],
        "against": first["name"],
        "difference": arm["exact"]["mean"] - first["exact"]["mean"],
        "quantities": {name: {"ratio": mine[name] / its[name], "matched": abs(mine[name] / its[name] - 1) <= MATCHED} for name in mine},
    }


def _quantities(arm: dict[str, Any]) -> dict[str, float]:
    return {
        "total parameters": arm["parameters"]["total"],
        "matmul parameters": arm["parameters"]["matmul"],
        "puzzle steps": arm["puzzle_steps"]["mean"],
        "model FLOPs": arm["flops"]["model"]["mean"],
        "seconds": arm["seconds"]["mean"],
    }
