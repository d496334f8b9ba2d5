"""Shards of puzzles: MDS files like those of text, with four columns of fixed size.

    inputs      ndarray:uint8:C    tokens of the puzzle, C cells
    answers     ndarray:uint8:C    tokens of the answer
    identifier  int64              which puzzle embedding
    rating      int32              difficulty

As every column has a fixed size, a sample is a record of 2 C + 12 bytes without headers (MDS puts the columns in the order of their names),
and a shard is read as one numpy array of records. Sizes and hashes are checked as each shard is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.location import Location
from data_pipeline.puzzles.manifest import PuzzleManifest, PuzzleSplit
from data_pipeline.shards import HASHES, INDEX, Damaged, Shard, ShardSamples, read_index
from data_pipeline.store import describe

SHARD_BYTES = 1 << 23  # uncompressed: 48,000 Sudokus


@dataclass(frozen=True)
class Puzzles:
    """Puzzles in memory: inputs and answers [n, cells] uint8, identifiers [n] int64, ratings [n] int32."""

    inputs: NDArray[np.uint8]
    answers: NDArray[np.uint8]
    identifiers: NDArray[np.int64]
    ratings: NDArray[np.int32]

    def __len__(self) -> int:
        """Puzzles."""
        return len(self.inputs)

    def take(self, rows: NDArray | slice) -> Puzzles:
        """The puzzles at `rows`."""
        return Puzzles(self.inputs[rows], self.answers[rows], self.identifiers[rows], self.ratings[rows])

    @classmethod
    def join(cls, parts: Sequence[Puzzles]) -> Puzzles:
        """All of `parts`, one after the other; at least one."""
        return cls(
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.answers for part in parts]),
            np.concatenate([part.identifiers for part in parts]),
            np.concatenate([part.ratings for part in parts]),
        )


def write_split(folder: Path, puzzles: Puzzles, rated_by: str) -> PuzzleSplit:
    """Write `puzzles` (at least one) as the new split `folder`; `rated_by`: "solver" or "file"."""
    from streaming import MDSWriter

    cells = puzzles.inputs.shape[1]
    columns = {"inputs": f"ndarray:uint8:{cells}", "answers": f"ndarray:uint8:{cells}", "identifier": "int64", "rating": "int32"}
    with MDSWriter(columns=columns, out=str(folder), compression="zstd", hashes=HASHES, size_limit=SHARD_BYTES) as writer:
        for inputs, answers, identifier, rating in zip(puzzles.inputs, puzzles.answers, puzzles.identifiers, puzzles.ratings, strict=True):
            writer.write({"inputs": inputs, "answers": answers, "identifier": identifier, "rating": rating})
    sizes = sum(file.stat().st_size for file in folder.glob("shard.*"))
    rated = puzzles.ratings
    ratings = {"least": int(rated.min()), "median": float(np.median(rated)), "mean": float(rated.mean()), "largest": int(rated.max())}
    return PuzzleSplit(len(puzzles), sizes, ratings, rated_by, hashlib.sha256((folder / INDEX).read_bytes()).hexdigest())


class PuzzleStore:
    """The shards of one split of a set of puzzles, wherever it lives."""

    def __init__(self, path_or_url: str | Path, split: str, cache: str | Path | None, manifest: PuzzleManifest) -> None:
        self.location = Location.of(path_or_url, cache)
        self.split = manifest.split(split, str(self.location))
        self._folder, self._cells = split, manifest.cells
        where = f"{self.location}/{split}/{INDEX}"
        try:
            text = self.location.fetch(f"{split}/{INDEX}").read_bytes()
        except FileNotFoundError as error:
            raise Refusal(f"{where} is missing. Restore the folder as a whole, or prepare the puzzles again.") from error
        self.shards = read_index(text, where, self.split.index_sha256)

    def read(self) -> Puzzles:
        """All puzzles of the split. A damaged shard is named in a Refusal; a remote one is fetched a second time first."""
        return Puzzles.join([self._sound(shard) for shard in self.shards])

    def load(self, shard: Shard, hashes: tuple[str, ...] = ("xxh64",), *, again: bool = False) -> Puzzles:
        """One shard's puzzles; raises Damaged or OSError unless it is what the index says."""
        data = self.location.fetch(f"{self._folder}/{shard.name}", again=again).read_bytes()
        return _Records(shard, data, hashes).puzzles(self._cells)

    def _sound(self, shard: Shard) -> Puzzles:
        try:
            return self.load(shard)
        except (Damaged, OSError) as first:
            if self.location.remote is None:
                raise self._damaged(shard, first) from first
        try:
            return self.load(shard, again=True)
        except (Damaged, OSError) as error:
            raise self._damaged(shard, error) from error

    def _damaged(self, shard: Shard, error: Exception) -> Refusal:
        stale = f" If the remote set was prepared anew, delete its old copy {self.location.folder}." if self.location.remote else ""
        return Refusal(
            f"Shard {self.location}/{self._folder}/{shard.name} {describe(error)}. Restore it from a copy, or prepare the puzzles again; "
            f"`attractor data verify` lists all that is damaged.{stale}"
        )


class _Records(ShardSamples):
    """A shard's samples, all at once."""

    def puzzles(self, cells: int) -> Puzzles:
        record = np.dtype([("answers", "u1", cells), ("identifier", "<i8"), ("inputs", "u1", cells), ("rating", "<i4")])
        start, end = self._offsets[0], self._offsets[-1]
        if end - start != len(self) * record.itemsize:
            raise Damaged(f"has {end - start} bytes of puzzles instead of {len(self)} records of {record.itemsize}")
        found = np.frombuffer(self._data, record, len(self), start)
        return Puzzles(*(np.ascontiguousarray(found[name]) for name in ("inputs", "answers", "identifier", "rating")))
