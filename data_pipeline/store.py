"""Samples of one split of a prepared set by index, from wherever it lives, each shard checked against its hash as it is read.

A handful of shards is kept decompressed in memory, the least recently used go first. Threads may share a store: a shard is read once. A
shard that is missing, cut short or changed is named in a Refusal; a remote one is fetched a second time first, in case only the copy is
bad.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.location import Location
from data_pipeline.manifest import TOKENIZER, Manifest, open_manifest
from data_pipeline.shards import INDEX, Damaged, Shard, ShardSamples, read_index
from data_pipeline.tokenizer import fingerprint


class Store:
    """`samples` windows of a split. `hold`: how many decompressed shards to keep."""

    def __init__(
        self, path_or_url: str | Path, split: str, cache: str | Path | None = None, *, hold: int = 2, check_sizes: bool = True
    ) -> None:
        """Refuses what is not a finished set, an index or tokenizer that does not belong to its manifest, and local shards missing or of
        a wrong size.
        """
        self.location = Location.of(path_or_url, cache)
        self.manifest: Manifest = open_manifest(path_or_url, cache)
        self.split = self.manifest.split(split, str(self.location))
        self._folder, self._hold = split, hold
        _check_tokenizer(self.location, self.manifest)
        self.shards = self._index()
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self.samples = int(self._ends[-1])
        self._kept: OrderedDict[int, ShardSamples] = OrderedDict()
        self._lock = Lock()
        self._shard_locks = [Lock() for _ in self.shards]
        if check_sizes and self.location.remote is None:
            self._check_sizes()

    def __getitem__(self, sample: int) -> NDArray:
        """Window [n] of ids, n = sequence_length + 1 save for the last sample."""
        number = int(np.searchsorted(self._ends, sample, side="right"))
        shard = self.shards[number]
        return self._shard(number)[sample - int(self._ends[number]) + shard.samples]

    def fetch(self, numbers: Sequence[int]) -> None:
        """Bring shards of a remote set into the cache, ahead of their use."""
        for number in numbers:
            self._path(self.shards[number])

    def _shard(self, number: int) -> ShardSamples:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        with self._shard_locks[number]:  # others wait for the one that reads it
            with self._lock:
                if number in self._kept:
                    return self._kept[number]
            samples = self._read(self.shards[number])
            with self._lock:
                self._kept[number] = samples
                while len(self._kept) > self._hold:
                    self._kept.popitem(last=False)
            return samples

    def _read(self, shard: Shard) -> ShardSamples:
        try:
            return ShardSamples(shard, self._path(shard).read_bytes())
        except (Damaged, OSError) as first:
            if self.location.remote is None:
                raise self._damaged(shard, first) from first
        try:
            return ShardSamples(shard, self._path(shard, again=True).read_bytes())
        except (Damaged, OSError) as error:
            raise self._damaged(shard, error) from error

    def _path(self, shard: Shard, again: bool = False) -> Path:
        return self.location.fetch(f"{self._folder}/{shard.name}", again=again)

    def _index(self) -> list[Shard]:
        where = f"{self.location}/{self._folder}/{INDEX}"
        try:
            text = self.location.fetch(f"{self._folder}/{INDEX}").read_bytes()
        except FileNotFoundError as error:
            raise Refusal(f"{where} is missing. Restore the folder as a whole, or prepare the data again.") from error
        return read_index(text, where, self.split.index_sha256)

    def _check_sizes(self) -> None:
        """All local shards are there and of the right size: a cheap look before the first step, not hours into an epoch."""
        for shard in self.shards:
            try:
                size = self._path(shard).stat().st_size
            except OSError as error:
                raise self._damaged(shard, error) from error
            if size != shard.bytes:
                raise self._damaged(shard, Damaged(f"has {size} bytes instead of {shard.bytes}"))

    def _damaged(self, shard: Shard, error: Exception) -> Refusal:
        stale = f" If the remote set was prepared anew, delete its old copy {self.location.folder}." if self.location.remote else ""
        return Refusal(
            f"Shard {self.location}/{self._folder}/{shard.name} {describe(error)}. Restore it from a copy, or prepare the data again; "
            f"`attractor data verify` lists all that is damaged.{stale}"
        )


def describe(error: Exception) -> str:
    """What is wrong with a shard, as the second half of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return str(error) if isinstance(error, Damaged) else f"cannot be read ({error})"


def _check_tokenizer(location: Location, manifest: Manifest) -> None:
    """The tokenizer.json beside the shards is the one they were encoded with."""
    where = f"{location}/{TOKENIZER}"
    try:
        found = fingerprint(location.fetch(TOKENIZER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise Refusal(f"{where} is missing or damaged ({error}). Restore it from a copy, or prepare the data again.") from error
    if found != manifest.tokenizer_fingerprint:
        raise Refusal(
            f"{where} is not the tokenizer that the shards were encoded with (fingerprint {found[:12]}, the manifest says "
            f"{manifest.tokenizer_fingerprint[:12]}): their ids mean other tokens. Put the right tokenizer.json back, or prepare the "
            "data again with this one."
        )
