"""Prepared sets for tests, written from ids directly: what the loader sees is real, the text behind it is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batches import IGNORED, Batch
from data_pipeline.manifest import MANIFEST, TOKENIZER, TRAIN, VALIDATION, Manifest
from data_pipeline.tokenizer import fingerprint
from data_pipeline.writing import SplitWriter

BOS = 0
NO_TOKENIZER = "{}"  # the store compares fingerprints and never opens it


def random_documents(count: int, seed: int = 0, vocabulary: int = 500, longest: int = 40) -> list[NDArray]:
    """Documents of ids, each with its begin token, which occurs nowhere else."""
    random = np.random.default_rng(seed)
    return [np.concatenate([[BOS], random.integers(1, vocabulary, random.integers(1, longest))]).astype(np.uint16) for _ in range(count)]


def write_set(
    folder: Path,
    documents: Sequence[NDArray],
    *,
    sequence_length: int = 16,
    dtype: str = "uint16",
    shard_bytes: int = 1000,
    tokenizer: str = NO_TOKENIZER,
    validation: Sequence[NDArray] = (),
) -> Path:
    """A finished prepared folder that holds these documents in small shards."""
    splits = {}
    for name, held in ((TRAIN, documents), (VALIDATION, validation)):
        if len(held):
            with patch("data_pipeline.shards.SHARD_BYTES", shard_bytes):
                writer = SplitWriter(folder / name, sequence_length + 1, dtype)
            for ids in held:
                writer.add(ids, 1, 0)
            splits[name] = writer.finish()
    manifest = Manifest(
        sequence_length=sequence_length,
        vocabulary_size=500,
        bos_id=BOS,
        dtype=dtype,
        tokenizer_fingerprint=fingerprint(tokenizer),
        sources=["test"],
        splits=splits,
    )
    (folder / TOKENIZER).write_text(tokenizer)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def windows_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """(sample id, window of ids) of each row, padding taken off again."""
    rows = zip(batch.tokens.numpy(), batch.targets.numpy(), batch.sample_ids.tolist(), strict=True)
    return [(sample, [int(tokens[0]), *targets[targets != IGNORED].tolist()]) for tokens, targets, sample in rows]
