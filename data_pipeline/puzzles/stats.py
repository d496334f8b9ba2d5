"""What a prepared set of puzzles holds: how hard they are and how much is given, by quantile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.games import BLANK, SUDOKU, WALL
from data_pipeline.puzzles.manifest import PuzzleManifest, open_puzzles
from data_pipeline.puzzles.shards import PuzzleStore

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class PuzzleSplitStats:
    """One split. `ratings` and `given` (a Sudoku's clues, a maze's walls): quantile -> value. `distinct`: puzzles, identical ones once."""

    puzzles: int
    distinct: int
    shards: int
    stored_bytes: int
    rated_by: str
    ratings: dict[str, int]
    given: dict[str, int]


@dataclass(frozen=True)
class PuzzleStats:
    """A prepared set. `given` says what is counted under that name."""

    path: str
    game: str
    size: int
    vocabulary_size: int
    sources: list[str]
    options: dict[str, Any]
    shared: int
    given: str
    splits: dict[str, PuzzleSplitStats]


def puzzle_stats(path: str | Path) -> PuzzleStats:
    """Reads every shard once."""
    manifest = open_puzzles(path)
    return PuzzleStats(
        path=str(path),
        game=manifest.game,
        size=manifest.height,
        vocabulary_size=manifest.vocabulary_size,
        sources=manifest.sources,
        options=manifest.options,
        shared=manifest.shared,
        given="clues" if manifest.game == SUDOKU else "walls",
        splits={name: _split(path, name, manifest) for name in manifest.splits},
    )


def _split(path: str | Path, name: str, manifest: PuzzleManifest) -> PuzzleSplitStats:
    store = PuzzleStore(path, name, None, manifest)
    puzzles = store.read()
    given = puzzles.inputs != BLANK if manifest.game == SUDOKU else puzzles.inputs == WALL
    return PuzzleSplitStats(
        puzzles=len(puzzles),
        distinct=len({row.tobytes() for row in puzzles.inputs}),
        shards=len(store.shards),
        stored_bytes=store.split.bytes,
        rated_by=store.split.rated_by,
        ratings=_quantiles(puzzles.ratings),
        given=_quantiles(given.sum(1)),
    )


def _quantiles(values: NDArray) -> dict[str, int]:
    return {f"{quantile:g}": int(np.quantile(values, quantile)) for quantile in QUANTILES}
