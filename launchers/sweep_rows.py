"""The rows of a sweep's table: what is planned of a member and what its folder says was measured, of either regime. No torch.

    language    tokens, and loss, perplexity, iterations of the last evaluation at the last of its depths
    puzzles     steps, puzzle steps (puzzles under way times steps), and accuracy of the last evaluation at the last supervision step

FLOPs are the model's; before a run has finished they are planned, with the expected iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launchers.output import si, size
from launchers.puzzle_plan import puzzle_run_flops
from launchers.series import Member, finished, started, summary
from model.cost import count_parameters
from model.reasoning.cost import count_reasoner
from pretrain.config import AnyRecipe, PuzzleRecipe, Recipe
from pretrain.matching import run_flops
from pretrain.recipe_files import LANGUAGE_REGIME, REASONING_REGIME
from pretrain.sweeps import Settings

Row = dict[str, Any]
Cell = Callable[[Row], str]


def row(settings: Settings, member: Member, recipe: AnyRecipe, code: int | None = None) -> Row:
    """What there is to say of a member whose recipe is complete. code: how its process ended, where it ran now."""
    found, done = summary(member.run), finished(member.run)
    evaluation = (found.get("evaluation") or {}) if done else {}
    if isinstance(recipe, PuzzleRecipe):
        regime, counts, own = REASONING_REGIME, count_reasoner(recipe.architecture), _of_puzzles(recipe, evaluation)
    else:
        regime, counts, own = LANGUAGE_REGIME, count_parameters(recipe.architecture), _of_language(recipe, evaluation)
    return {
        "member": member.name,
        "run": str(member.run),
        "regime": regime,
        "settings": settings,
        "state": "finished" if done else f"failed ({code})" if code else "interrupted" if started(member.run) else "to train",
        "parameters": {"total": counts.total, "matmul": counts.matmul},
        **own,
        **({"tokens": found["tokens"], "flops": found["flops"]["model"]} if done else {}),
        "seconds": found["seconds"] if done else None,
        "memory_bytes": found["metrics"]["memory_bytes"] if done else None,
    }


def _of_language(recipe: Recipe, evaluation: Mapping[str, Any]) -> Row:
    length = recipe.data.sequence_length or 0
    tokens = recipe.steps(length) * recipe.train.global_batch * length
    depth = next(reversed(evaluation.get("loss", {})), "")
    told = {key: evaluation.get(key, {}).get(depth) for key in ("loss", "perplexity", "iterations")}
    return {"tokens": tokens, "flops": run_flops(recipe, tokens), **told, "converged": evaluation.get("converged")}


def _of_puzzles(recipe: PuzzleRecipe, evaluation: Mapping[str, Any]) -> Row:
    puzzle_steps = recipe.train.steps * recipe.train.global_batch
    step = next(reversed(evaluation.get("exact", {})), "")
    told = {key: evaluation.get(key, {}).get(step) for key in ("loss", "exact", "cells", "valid")}
    return {
        "tokens": puzzle_steps * recipe.cells,
        "flops": puzzle_run_flops(recipe),
        "steps": recipe.train.steps,
        "puzzle_steps": puzzle_steps,
        **told,
        "iterations": evaluation.get("iterations"),
    }


def _text(key: str, form: str, scale: float = 1.0, unit: str = "") -> Cell:
    return lambda row: "" if row[key] is None else format(scale * row[key], form) + unit


_BEFORE: dict[str, Cell] = {
    "parameters": lambda row: si(row["parameters"]["total"]),
    "in matmuls": lambda row: si(row["parameters"]["matmul"]),
}
_AFTER: dict[str, Cell] = {
    "seconds": _text("seconds", ".0f"),
    "memory": lambda row: size(row["memory_bytes"]) if row["memory_bytes"] else "",
    "state": lambda row: row["state"],
}
COLUMNS: dict[str, dict[str, Cell]] = {
    LANGUAGE_REGIME: {
        **_BEFORE,
        "tokens": lambda row: si(row["tokens"]),
        "FLOPs": lambda row: si(row["flops"]),
        "loss": _text("loss", ".4f"),
        "perplexity": _text("perplexity", ".2f"),
        "iterations": _text("iterations", ".2f"),
        "converged": _text("converged", ".0f", 100, " %"),
        **_AFTER,
    },
    REASONING_REGIME: {
        **_BEFORE,
        "steps": lambda row: f"{row['steps']:,}",
        "puzzle steps": lambda row: si(row["puzzle_steps"]),
        "FLOPs": lambda row: si(row["flops"]),
        "exact": _text("exact", ".1f", 100, " %"),
        "cells": _text("cells", ".1f", 100, " %"),
        "valid": _text("valid", ".1f", 100, " %"),
        "iterations": _text("iterations", ".2f"),
        **_AFTER,
    },
}
"""By regime: the columns of the table, and how each shows a row."""

NOTES = {
    LANGUAGE_REGIME: "Losses are those of the last evaluation in training, at the last of its depths. FLOPs are the model's.",
    REASONING_REGIME: "Accuracies are those of the last evaluation in training, at the last of its supervision steps: exact, of puzzles "
    "with every cell right; cells, of cells. A puzzle step is one supervision step of one puzzle. FLOPs are the model's.",
}


def cells(row: Row) -> dict[str, str]:
    """The row as text, by column."""
    return {name: cell(row) for name, cell in COLUMNS[row["regime"]].items()}
