"""Benchmarks of the data's way, for `attractor bench data`. Each figure comes from processes of its own, so that threads and caches start
alike."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from data_pipeline.encoding import AHEAD, CHUNK, ParallelEncoder
from data_pipeline.reading import Document
from data_pipeline.tokenizer import begin_id, id_count, id_dtype, tokenizer_from_json

Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenisingBench:
    """MB of UTF-8 text a second: ours, from documents to arrays of ids in order, against one bare call of `encode_batch`."""

    workers: int
    megabytes: float
    ours: float
    encode_batch: float


def bench_tokenising(texts: Sequence[str], tokenizer_json: str, workers: int, repeats: int = 3) -> TokenisingBench:
    """Both on `workers` cores, in turns, the best of `repeats` of each."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    ours, plain = [], []
    for _ in range(repeats):
        ours.append(_in_process(workers, _seconds_ours, list(texts), tokenizer_json, workers))
        plain.append(_in_process(workers, _seconds_plain, list(texts), tokenizer_json))
    return TokenisingBench(workers, size, size / min(ours), size / min(plain))


def bench_loading(path: str | Path, seconds: float = 3.0, micro_batch: int = 8, workers: int = 0) -> float:
    """Tokens a second of a TokenLoader on a prepared folder, opening it not included."""
    return _in_process(1, _tokens_per_second, str(path), seconds, micro_batch, workers)


def _in_process(threads: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Run in a spawned process whose libraries may use `threads` threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _limit_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


def _limit_threads(threads: int) -> None:
    os.environ.update(RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM=str(threads > 1).lower())


def _seconds_ours(texts: list[str], tokenizer_json: str, workers: int) -> float:
    tokenizer = tokenizer_from_json(tokenizer_json, "the tokenizer")
    bos_id, dtype = begin_id(tokenizer, "the tokenizer"), id_dtype(id_count(tokenizer))
    with ParallelEncoder(tokenizer_json, bos_id, dtype, workers) as encoder:
        for _ in encoder.encode([Document("a word or two " * (CHUNK // 14 + 1), "warm-up")] * AHEAD * workers):
            pass  # until every worker has started
        start = perf_counter()
        for _ in encoder.encode(Document(text, "bench") for text in texts):
            pass
        return perf_counter() - start


def _seconds_plain(texts: list[str], tokenizer_json: str) -> float:
    tokenizer = tokenizer_from_json(tokenizer_json, "the tokenizer")
    start = perf_counter()
    tokenizer.encode_batch(texts, add_special_tokens=False)
    return perf_counter() - start


def _tokens_per_second(path: str, seconds: float, micro_batch: int, workers: int) -> float:
    import torch

    from data_pipeline.loader import TokenLoader

    torch.set_num_threads(1)
    loader = TokenLoader([(path, 1.0)], micro_batch=micro_batch, workers=workers)
    next(loader)
    tokens, start = 0, perf_counter()
    while (passed := perf_counter() - start) < seconds:
        tokens += next(loader).tokens.numel()
    loader.close()
    return tokens / passed
