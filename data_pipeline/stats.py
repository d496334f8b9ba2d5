"""Stats: what a prepared folder holds, from its manifest and the lengths of its documents. Puzzles: puzzles/stats.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Counts, open_manifest
from data_pipeline.puzzles.manifest import holds_puzzles
from data_pipeline.puzzles.stats import PuzzleStats, puzzle_stats
from data_pipeline.store import Store

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TOP = 20


@dataclass(frozen=True)
class SplitStats:
    """One split. `lengths`: quantile -> tokens of a document, its begin token included. `bytes_per_token` leaves begin tokens out of the
    tokens.
    """

    documents: int
    tokens: int
    bytes: int
    windows: int
    shards: int
    stored_bytes: int
    bytes_per_token: float
    lengths: dict[str, int]


@dataclass(frozen=True)
class Stats:
    """A prepared folder. `top` are the origins with the most tokens."""

    path: str
    sequence_length: int
    vocabulary_size: int
    tokenizer_fingerprint: str
    sources: list[str]
    splits: dict[str, SplitStats]
    top: dict[str, Counts]
    skipped: dict[str, int]


def stats(path: str | Path) -> Stats | PuzzleStats:
    """Reads every shard once, for the lengths of the documents."""
    if holds_puzzles(path):
        return puzzle_stats(path)
    manifest = open_manifest(path)
    return Stats(
        path=str(path),
        sequence_length=manifest.sequence_length,
        vocabulary_size=manifest.vocabulary_size,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        sources=manifest.sources,
        splits={name: _split(Store(path, name)) for name in manifest.splits},
        top=dict(list(manifest.origins.items())[:TOP]),
        skipped=manifest.skipped,
    )


def _split(store: Store) -> SplitStats:
    begins, tokens = [], 0
    for sample in range(store.samples):
        window = store[sample]
        begins.append(tokens + np.flatnonzero(window == store.manifest.bos_id))
        tokens += len(window)
    lengths = np.diff(np.concatenate([*begins, [tokens]]))
    split = store.split
    return SplitStats(
        documents=split.documents,
        tokens=split.tokens,
        bytes=split.bytes,
        windows=split.windows,
        shards=len(store.shards),
        stored_bytes=sum(shard.bytes for shard in store.shards),
        bytes_per_token=split.bytes / max(1, split.tokens - split.documents),
        lengths={f"{quantile:g}": int(np.quantile(lengths, quantile)) for quantile in QUANTILES},
    )
