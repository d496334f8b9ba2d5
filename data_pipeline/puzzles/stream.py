"""Puzzles for training and evaluation, as torch tensors.

PuzzleStream is an endless row of augmented puzzles. Position p of a set of N puzzles is in epoch p // N; each epoch visits every puzzle
once, in an order permuted by (seed, epoch), each changed by a symmetry drawn from (seed, epoch, index). So what stands at a position
depends on nothing but the position: resuming at one and dealing positions out to ranks are arithmetic, and there is no state to save.

PuzzleSet is one split as it is, for evaluation. Both hold their split in memory (174 bytes a 9x9 Sudoku, 1.8 kB a 30x30 maze).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.manifest import TRAIN, VALIDATION
from data_pipeline.order import SetOrder
from data_pipeline.puzzles.augment import augment as augmented
from data_pipeline.puzzles.manifest import open_puzzles
from data_pipeline.puzzles.shards import Puzzles, PuzzleStore


class PuzzleBatch(NamedTuple):
    """n puzzles: inputs, answers [n, cells] uint8 tokens; identifiers [n] int64; ratings [n] int32; index [n] int64, rows of the split."""

    inputs: Tensor
    answers: Tensor
    identifiers: Tensor
    ratings: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody calls


def _batch(puzzles: Puzzles, index: NDArray[np.int64]) -> PuzzleBatch:
    return PuzzleBatch(
        *(torch.from_numpy(column) for column in (puzzles.inputs, puzzles.answers, puzzles.identifiers, puzzles.ratings, index))
    )


class PuzzleStream:
    """The endless row of one split's puzzles. `puzzles`: how many there are, the length of an epoch."""

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = TRAIN,
        seed: int = 0,
        augment: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        """Refuses what is not a finished set of puzzles, a split it does not have, and damaged shards."""
        self.manifest = open_puzzles(path, cache)
        store = PuzzleStore(path, split, cache, self.manifest)
        self._held = store.read()
        self.puzzles = len(self._held)
        self._order = SetOrder([self.puzzles], seed)
        self._split, self._index_sha256 = split, store.split.index_sha256
        self._seed, self._augment = seed, augment

    def read(self, start: int, count: int) -> PuzzleBatch:
        """The puzzles at positions start ... start + count - 1, start >= 0."""
        index = self._order.read(start, count)
        found = self._held.take(index)
        if self._augment:
            epoch = np.arange(start, start + count) // self.puzzles
            inputs, answers = augmented(self.manifest.board, found.inputs, found.answers, self._seed, epoch, index)
            found = replace(found, inputs=inputs, answers=answers)
        return _batch(found, index)

    def identity(self) -> dict[str, Any]:
        """What decides the row, as plain values: a checkpoint keeps them, and positions mean something else where one differs."""
        return {"split": self._split, "index_sha256": self._index_sha256, "seed": self._seed, "augment": self._augment}


class PuzzleSet:
    """One split, unaugmented, in the order it was prepared in: inputs, answers, identifiers, ratings as torch tensors."""

    def __init__(self, path: str | Path, split: str = VALIDATION, cache: str | Path | None = None) -> None:
        """Refuses what is not a finished set of puzzles, a split it does not have, and damaged shards."""
        self.manifest = open_puzzles(path, cache)
        held = PuzzleStore(path, split, cache, self.manifest).read()
        self._all = _batch(held, np.arange(len(held)))

    def __len__(self) -> int:
        """Puzzles."""
        return len(self._all.index)

    @property
    def inputs(self) -> Tensor:
        """[n, cells] uint8."""
        return self._all.inputs

    @property
    def answers(self) -> Tensor:
        """[n, cells] uint8."""
        return self._all.answers

    @property
    def ratings(self) -> Tensor:
        """[n] int32."""
        return self._all.ratings

    def batch(self, rows: slice | Tensor) -> PuzzleBatch:
        """The puzzles at `rows`."""
        return PuzzleBatch(*(column[rows] for column in self._all))
