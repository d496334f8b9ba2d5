"""The benchmarks run and measure what they say; how fast is not a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.bench import bench_loading, bench_tokenising
from data_pipeline.tokenizer import train_tokenizer


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenising(workers: int) -> None:
    texts = ["some words to encode, again and again\n" * 100] * 20
    found = bench_tokenising(texts, train_tokenizer(iter(texts), 300).to_str(), workers, repeats=1)
    assert found.workers == workers
    assert found.megabytes == pytest.approx(0.076)
    assert found.ours > 0
    assert found.encode_batch > 0


def test_loading(small_set: Path) -> None:
    assert bench_loading(small_set, seconds=0.1) > 0
