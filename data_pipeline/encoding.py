"""Documents to token ids, in parallel and in order.

`tokenizers` can use threads, but threads that share its word cache do not scale as processes do, and a forked process that inherits its
threads hangs. So: one worker encodes in this process by `encode_batch_fast`; more are spawned processes, each with a tokenizer of its own
and its threads switched off. What travels is text one way and one array of ids the other. Results come back in the order of the
documents, whatever the number of workers, and at most a few chunks a worker are under way, so memory does not grow with the corpus.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.reading import Document
from data_pipeline.tokenizer import tokenizer_from_json

CHUNK = 1 << 19  # characters a worker gets at a time
BATCH = 1 << 23  # characters at a time in this process, where threads share them
AHEAD = 4  # chunks under way for each worker


class Encoded(NamedTuple):
    """Documents and their ids end to end: document i owns ids[ends[i - 1] : ends[i]], its begin token first if it begins."""

    documents: list[Document]
    ids: NDArray
    ends: NDArray[np.int64]


class Encoder:
    """Texts to ids with one tokenizer, in this process."""

    def __init__(self, tokenizer_json: str, bos_id: int, dtype: str) -> None:
        self._tokenizer = tokenizer_from_json(tokenizer_json, "the tokenizer")
        self._bos_id, self._dtype = bos_id, np.dtype(dtype)

    def __call__(self, texts: list[str], begins: list[bool]) -> tuple[NDArray, NDArray[np.int64]]:
        """Ids end to end, and where each text's ids end."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ends = np.cumsum([len(encoding) + begin for encoding, begin in zip(encodings, begins, strict=True)], dtype=np.int64)
        ids = np.empty(ends[-1] if len(ends) else 0, self._dtype)
        start = 0
        for encoding, begin, end in zip(encodings, begins, ends.tolist(), strict=True):
            if begin:
                ids[start] = self._bos_id
            ids[start + begin : end] = encoding.ids
            start = end
        return ids, ends


class ParallelEncoder:
    """The same with `workers` processes (<= 1: this one), over a stream of documents. Use it in a with block, which ends the processes."""

    def __init__(self, tokenizer_json: str, bos_id: int, dtype: str, workers: int) -> None:
        self._workers = workers
        self._here = Encoder(tokenizer_json, bos_id, dtype) if workers <= 1 else None
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, bos_id, dtype))

    def __enter__(self) -> ParallelEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """All documents in order, a chunk at a time."""
        if self._pool is None:
            assert self._here is not None
            for chunk in _chunks(documents, BATCH):
                yield Encoded(chunk, *self._here(*_columns(chunk)))
            return
        under_way: deque[tuple[list[Document], Future]] = deque()
        for chunk in _chunks(documents, CHUNK):
            under_way.append((chunk, self._pool.submit(_encode_in_worker, *_columns(chunk))))
            while len(under_way) > AHEAD * self._workers or (under_way and under_way[0][1].done()):
                yield _result(*under_way.popleft())
        while under_way:
            yield _result(*under_way.popleft())


def _columns(documents: list[Document]) -> tuple[list[str], list[bool]]:
    return [document.text for document in documents], [document.begins for document in documents]


def _result(documents: list[Document], future: Future) -> Encoded:
    try:
        return Encoded(documents, *future.result())
    except BrokenProcessPool as error:
        raise Refusal(
            f"A tokenising worker was killed while it encoded documents of {documents[0].origin}, most likely for want of memory. "
            "Prepare again with fewer --workers."
        ) from error


def _chunks(documents: Iterable[Document], length: int) -> Iterator[list[Document]]:
    """Runs of documents of about `length` characters."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= length:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: Encoder  # of a worker process


def _start_worker(tokenizer_json: str, bos_id: int, dtype: str) -> None:
    """In a fresh process: no threads of `tokenizers`, Ctrl-C left to the parent, and an end when the parent has ended in any way."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_json, bos_id, dtype)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str], begins: list[bool]) -> tuple[NDArray, NDArray[np.int64]]:
    return _encoder(texts, begins)
