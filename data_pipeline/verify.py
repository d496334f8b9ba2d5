"""Verify: every byte of a prepared folder against its manifest. A set of puzzles is verified by puzzles/verify.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import Refusal
from data_pipeline.manifest import open_manifest
from data_pipeline.puzzles.manifest import holds_puzzles
from data_pipeline.puzzles.verify import PuzzleReport, verify_puzzles
from data_pipeline.shards import HASHES, Damaged, Shard, ShardSamples
from data_pipeline.store import Store, describe

NAMED = 20  # damaged shards in one message


@dataclass(frozen=True)
class VerifyReport:
    """What was found sound."""

    path: str
    splits: list[str]
    shards: int
    bytes: int
    windows: int
    tokens: int


def verify(path: str | Path, progress: Callable[[float], None] | None = None) -> VerifyReport | PuzzleReport:
    """Check tokenizer, indexes, of every shard presence, size, both hashes and samples, and the manifest's counts of each split.

    Returns only if all are sound: the Refusal names each damaged shard and what is wrong with it. Of puzzles also each one's solution is
    checked, and `progress` told the share done.
    """
    if holds_puzzles(path):
        return verify_puzzles(path, progress)
    manifest = open_manifest(path)
    shards = size = windows = tokens = 0
    damaged: list[str] = []
    for name in manifest.splits:
        store = Store(path, name, check_sizes=False)
        found = [f"{name}/{shard.name} {what}" for shard in store.shards if (what := _damage(store, name, shard))]
        damaged += found or _miscounts(store, name)
        shards, size = shards + len(store.shards), size + sum(shard.bytes for shard in store.shards)
        windows, tokens = windows + store.samples, tokens + store.split.tokens
    if damaged:
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise Refusal(f"{path} is damaged: {'; '.join(damaged[:NAMED])}{more}. Restore these files from a copy, or prepare the data again.")
    return VerifyReport(str(path), sorted(manifest.splits), shards, size, windows, tokens)


def _damage(store: Store, split: str, shard: Shard) -> str | None:
    """What is wrong with a shard's file, or None."""
    try:
        ShardSamples(shard, store.location.fetch(f"{split}/{shard.name}").read_bytes(), tuple(HASHES))
    except (Damaged, OSError) as error:
        return describe(error)
    return None


def _miscounts(store: Store, name: str) -> list[str]:
    """Where sound shards do not hold what the manifest says."""
    tokens = documents = 0
    largest = -1
    for sample in range(store.samples):
        window = store[sample]
        tokens += len(window)
        documents += int(np.count_nonzero(window == store.manifest.bos_id))
        largest = max(largest, int(window.max()))
    pairs = {
        "windows": (store.samples, store.split.windows),
        "tokens": (tokens, store.split.tokens),
        "documents": (documents, store.split.documents),
        "largest id": (largest, store.split.largest_id),
    }
    return [f"{name} has {found} as its {what}, the manifest says {said}" for what, (found, said) in pairs.items() if found != said]
