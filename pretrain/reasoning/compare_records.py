"""Runs on puzzles as their folders tell them, for comparisons. Reads files only: no torch, nothing is written.

    config.yaml, metrics.jsonl, evaluations.jsonl, run.json, summary.json, and the manifest of the puzzles it was validated on

What a run reached is what its evaluations say, at the last of their supervision steps: that is how the model is used. Refused: runs of
language models among those of puzzles, runs without an evaluation, another game, another validation set or another part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import VALIDATION
from data_pipeline.puzzles import PuzzleManifest, open_puzzles
from model.reasoning.cost import count_reasoner
from pretrain.compare_records import Records, read_records, stored_recipe
from pretrain.config import read_recipe
from pretrain.errors import Refusal
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.run_folder import CONFIG, EVALUATIONS


class Accuracy(NamedTuple):
    """Evaluations of a run, arrays [n] in the order of training. exact and cells are shares; flops are hardware FLOPs so far."""

    steps: NDArray[np.int64]
    flops: NDArray[np.float64]
    seconds: NDArray[np.float64]
    exact: NDArray[np.float64]
    cells: NDArray[np.float64]


@dataclass(frozen=True)
class PuzzleRun(Records):
    """One run on puzzles."""

    recipe: PuzzleRecipe
    manifest: PuzzleManifest

    @property
    def total_steps(self) -> int:
        return self.recipe.train.steps

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def game(self) -> str:
        """With its size: sudoku 9 x 9."""
        return f"{self.manifest.game} {self.manifest.height} x {self.manifest.width}"

    @property
    def validation_sha256(self) -> str:
        return self.manifest.splits[VALIDATION].index_sha256

    @property
    def training_sha256(self) -> str:
        """Of the puzzles it was trained on; empty where the manifest has no such split."""
        split = self.manifest.splits.get("train")
        return "" if split is None else split.index_sha256

    @property
    def evaluated_puzzles(self) -> int:
        return int(self.evaluations[-1]["puzzles"])

    @cached_property
    def accuracy(self) -> Accuracy:
        """FLOPs and seconds between two records are interpolated."""
        told = self.evaluations
        tokens = np.array([record["tokens"] for record in told], float)
        exact, cells = (np.array([own(record, key) for record in told], float) for key in ("exact", "cells"))
        return Accuracy(np.array([record["step"] for record in told]), *self.spent_at(tokens), exact, cells)

    def parameters(self) -> dict[str, int]:
        """By kind, in closed form from the recipe."""
        return asdict(count_reasoner(self.recipe.architecture))


def own(record: dict[str, Any], key: str) -> float | None:
    """A figure of an evaluation at the last of its supervision steps; None where it has none (`valid`, of a Sudoku)."""
    return None if key not in record else list(record[key].values())[-1]


def are_puzzles(runs: Sequence[Path]) -> bool:
    """Whether all runs are of puzzles; False where none is. Raises Refusal for a folder without a run, and for some of each."""
    regimes = {path: isinstance(read_recipe(stored_recipe(path), str(path / CONFIG)), PuzzleRecipe) for path in runs}
    if len(set(regimes.values())) < 2:
        return all(regimes.values())
    puzzles, text = (next(path for path, found in regimes.items() if found is wanted) for wanted in (True, False))
    raise Refusal(
        f"{puzzles} is a run on puzzles, and {text} one of a language model: an accuracy cannot be compared with a loss of text. Compare "
        "runs of one regime at a time."
    )


def read_puzzle_run(path: Path, name: str) -> PuzzleRun:
    """Reads a run folder. Raises Refusal for records that are missing or damaged, and for a set of puzzles that is not there."""
    recipe = read_recipe(stored_recipe(path), str(path / CONFIG))
    assert isinstance(recipe, PuzzleRecipe)  # are_puzzles has looked
    records = read_records(path, name)
    if not records.evaluations:
        raise Refusal(
            f"The run {path} has not been evaluated yet ({EVALUATIONS} is missing or empty): there is no accuracy to compare. Wait until "
            f"step {recipe.evaluation.every} (evaluation.every), or leave it out."
        )
    source = recipe.sources[0][0]
    try:
        manifest = open_puzzles(source, recipe.data.cache)
        manifest.split(VALIDATION, source)
    except Refusal as error:
        raise Refusal(
            f"What the run {path} was validated on cannot be told. {error} A relative data.path counts from the folder this command is "
            "started in; the manifest.json alone is enough."
        ) from error
    return PuzzleRun(**vars(records), recipe=recipe, manifest=manifest)


def refuse_unlike_puzzles(runs: Sequence[PuzzleRun]) -> None:
    """Raises Refusal unless all were evaluated on the same puzzles: same game, validation split (by hash) and number of puzzles of it."""
    first = runs[0]
    checks: tuple[tuple[str, Callable[[PuzzleRun], str], str], ...] = (
        ("games", lambda run: run.game, "An accuracy at one says nothing of one at the other."),
        (
            "validation sets",
            lambda run: run.validation_sha256[:12],
            "Train both on sets with one validation split (attractor data).",
        ),
        (
            "numbers of validation puzzles",
            lambda run: " and ".join(str(n) for n in sorted({record["puzzles"] for record in run.evaluations})),
            "Train with one evaluation.puzzles, or compare what `attractor evaluate` says of each.",
        ),
    )
    for run in runs:
        for what, value, remedy in checks:
            if value(first) != value(run):
                raise Refusal(
                    f"{first.path} and {run.path} have different {what} ({value(first)} and {value(run)}): their accuracies cannot be "
                    f"compared. {remedy}"
                )
