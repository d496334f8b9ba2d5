"""Shards: MDS files as mosaicml-streaming writes them, so that its own StreamingDataset can read them too.

    index.json               for each shard: file name, bytes, sha1 and xxh64, samples; column encodings
    shard.00000.mds.zstd     uint32 n | uint32 offsets [n + 1] | config (JSON) | n samples; compressed by zstd

A sample has one column, "tokens": a window of ids (ndarray:uint16 or ndarray:uint32). A shard is always read whole into memory, so its
hash is checked each time at next to no cost (xxh64: gigabytes a second) and nothing is decompressed onto a disk, which may be read-only
or shared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal

COLUMN = "tokens"
SHARD_BYTES = 1 << 23  # uncompressed: 4M tokens of uint16; small enough to hold a shuffle block of them
HASHES = ["sha1", "xxh64"]
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One line of index.json: the compressed file, its size and hashes, and what is inside."""

    name: str
    bytes: int
    hashes: dict[str, str]
    raw_bytes: int
    samples: int
    compression: str | None
    info: dict[str, Any]


class ShardWriter:
    """Writes windows to `folder`/shard.*.mds.zstd."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from streaming import MDSWriter

        self._folder = folder
        columns = {COLUMN: f"ndarray:{dtype}"}
        self._writer = MDSWriter(columns=columns, out=str(folder), compression="zstd", hashes=HASHES, size_limit=SHARD_BYTES)
        self.windows = 0

    def write(self, window: NDArray) -> None:
        """Append one window [n] of ids, n >= 1."""
        self._writer.write({COLUMN: window})
        self.windows += 1

    def finish(self) -> str:
        """Write the last shard and the index; returns the index's SHA-256."""
        self._writer.finish()
        return hashlib.sha256((self._folder / INDEX).read_bytes()).hexdigest()


def read_index(text: bytes, where: str, sha256: str) -> list[Shard]:
    """The shards of an index.json whose hash the manifest holds. Refuses one that was damaged or belongs to another preparation."""
    found = hashlib.sha256(text).hexdigest()
    if found != sha256:
        raise Refusal(
            f"{where} is not the index that the manifest was written with (sha256 {found[:12]} instead of {sha256[:12]}): it is damaged, "
            "or shards of "
            "another preparation were copied over these. Prepare the data again, or restore the folder as a whole."
        )
    return [_shard(info) for info in json.loads(text)["shards"]]


def _shard(info: dict[str, Any]) -> Shard:
    stored = info["zip_data"] or info["raw_data"]
    return Shard(
        name=stored["basename"],
        bytes=stored["bytes"],
        hashes=stored["hashes"],
        raw_bytes=info["raw_data"]["bytes"],
        samples=info["samples"],
        compression=info["compression"],
        info=info,
    )


class Damaged(Exception):
    """What is wrong with one shard: half a sentence, which the caller completes with its name and the remedy."""


class ShardSamples:
    """The samples of one shard, decompressed in memory."""

    def __init__(self, shard: Shard, data: bytes, hashes: tuple[str, ...] = ("xxh64",)) -> None:
        """`data`: the file as stored. Raises Damaged unless size, hashes, uncompressed size and number of samples are those of the
        index.
        """
        from streaming.base.format import reader_from_json
        from streaming.base.hashing import get_hash

        if len(data) != shard.bytes:
            raise Damaged(f"has {len(data)} bytes instead of {shard.bytes}")
        for name in hashes:
            if get_hash(name, data) != shard.hashes[name]:
                raise Damaged(f"has another {name} than its index says")
        self._data = _decompressed(shard, data)
        samples = int(np.frombuffer(self._data[:4], np.uint32)[0])
        if len(self._data) != shard.raw_bytes or samples != shard.samples:
            raise Damaged(f"holds {samples} samples in {len(self._data)} bytes instead of {shard.samples} in {shard.raw_bytes}")
        self._offsets = np.frombuffer(self._data, np.uint32, samples + 1, 4).tolist()
        self._reader = reader_from_json("", "", shard.info)

    def __len__(self) -> int:
        """Samples."""
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> NDArray:
        """The window [n] of sample `index`."""
        return self._reader.decode_sample(self._data[self._offsets[index] : self._offsets[index + 1]])[COLUMN]


def _decompressed(shard: Shard, data: bytes) -> bytes:
    from streaming.base.compression import decompress

    try:
        return decompress(shard.compression, data)
    except Exception as error:  # each compression library has exceptions of its own
        raise Damaged(f"cannot be decompressed ({error})") from error
