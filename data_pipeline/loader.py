"""Loaders: from prepared sets to micro-batches, the same for any number of workers, and resumable exactly.

The samples form one endless row (order.py). Micro-step k of n data ranks with B sequences each reads positions knB ... (k + 1)nB - 1 of
it, rank r the r-th slice of B: so 2 ranks of B see what 1 rank of 2B sees. The state of a loader is its position in that row, counted in
samples that were handed out, never in samples that were fetched ahead; it holds for another number of ranks or another micro-batch too.

`workers` are threads: reading, hashing and decompressing release the interpreter's lock, nothing is forked, and a kill -9 leaves nothing
behind. Why not StreamingDataset itself: see docs/data.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batches import Batch, make_batch, past_vocabulary
from data_pipeline.errors import Refusal
from data_pipeline.manifest import TRAIN, VALIDATION, Manifest
from data_pipeline.order import BLOCK, MixtureOrder, SetOrder
from data_pipeline.store import Store

__all__ = ["Batch", "TokenLoader", "ValidationLoader"]

AHEAD = 2  # micro-batches under way for each worker
FORMAT = 1  # of the state


class TokenLoader:
    """Endless training micro-batches of one data rank, from a weighted mixture of prepared sets."""

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, float]],
        split: str = TRAIN,
        *,
        sequence_length: int | None = None,
        micro_batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        seed: int = 0,
        workers: int = 0,
        cache: str | Path | None = None,
        vocabulary_limit: int | None = None,
    ) -> None:
        """sources: (path or URL of a prepared set, weight): the share of samples is in proportion to the weight.

        Refuses sets whose tokenizers or lengths differ, a `sequence_length` that is not the prepared one (None: as prepared), ids not below
        `vocabulary_limit`, and whatever store.py finds damaged.
        """
        _check_slice(micro_batch, data_rank, data_ranks)
        if not sources:
            raise Refusal("No prepared set to train on. Set data.path to a folder that `attractor data prepare` made.")
        self._stores = [Store(path, split, cache, hold=BLOCK + 4) for path, _ in sources]
        self._weights = [float(weight) for _, weight in sources]
        _check_weights(self._stores, self._weights)
        _check_alike(self._stores)
        self.sequence_length = _checked_length(self._stores[0], sequence_length)
        _check_vocabulary(self._stores, vocabulary_limit)
        self._micro_batch, self._data_rank, self._data_ranks = micro_batch, data_rank, data_ranks
        self._seed, self._vocabulary_limit = seed, vocabulary_limit
        orders = [SetOrder([shard.samples for shard in store.shards], seed, index) for index, store in enumerate(self._stores)]
        self._order = MixtureOrder(orders, self._weights, seed)
        self._position = self._requested = 0  # samples of all ranks handed out; asked for
        self._under_way: deque[Future[Batch]] = deque()
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, "loader") if workers else None
        self._fetching = ThreadPoolExecutor(1, "fetch") if workers and any(store.location.remote for store in self._stores) else None
        self._blocks = [(-1, -1)] * len(self._stores)  # whose successors are being fetched

    @property
    def manifest(self) -> Manifest:
        """Of the first set: tokenizer, begin token and dtype are the same in all."""
        return self._stores[0].manifest

    @property
    def epochs(self) -> list[int]:
        """Complete passes over each set."""
        return [seen // source.samples for seen, source in zip(self._order.consumed(self._position), self._order.sources, strict=True)]

    @property
    def epoch(self) -> int:
        """Complete passes over every set: the smallest of `epochs`."""
        return min(self.epochs)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch of this rank. After an error the same one is next again."""
        try:
            batch = self._next_batch()
        except BaseException:
            self._forget()
            raise
        self._position += self._micro_batch * self._data_ranks
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the row stands, and what it is a row of."""
        return {"format": FORMAT, "samples": self._position, "seed": self._seed, "sources": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last micro-batch that was handed out when `state` was taken. Refuses the state of other data or another
        seed.
        """
        if state.get("format") != FORMAT:
            raise Refusal(
                f"The data position has format {state.get('format')!r}, this version reads {FORMAT}. Resume with the version that saved it."
            )
        if state["seed"] != self._seed or list(state["sources"]) != self._identity():
            raise Refusal(
                "The data position belongs to other data: it was saved with "
                f"seed {state['seed']} and {_describe(state['sources'])}, now there is seed {self._seed} and "
                f"{_describe(self._identity())}. "
                "Resume with the data, weights and seed of the run, or start a new run."
            )
        self._position = int(state["samples"])
        self._forget()

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._fetching):
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)

    def _identity(self) -> list[dict[str, Any]]:
        """What must not change between saving and resuming; paths may."""
        return [
            {"weight": weight, "samples": store.samples, "index": store.split.index_sha256}
            for store, weight in zip(self._stores, self._weights, strict=True)
        ]

    def _next_batch(self) -> Batch:
        if self._threads is None:
            return self._make(self._next_samples())
        while len(self._under_way) < AHEAD * self._workers:
            self._fetch_ahead()
            self._under_way.append(self._threads.submit(self._make, self._next_samples()))
        return self._under_way.popleft().result()

    def _forget(self) -> None:
        """Drop what was asked for beyond what was handed out."""
        for future in self._under_way:
            future.cancel()
        self._under_way.clear()
        self._requested = self._position

    def _next_samples(self) -> NDArray[np.int64]:
        """Global indices [B] of this rank's next slice."""
        start = self._requested + self._data_rank * self._micro_batch
        self._requested += self._micro_batch * self._data_ranks
        return self._order.read(start, self._micro_batch)

    def _fetch_ahead(self) -> None:
        """On entering a block of a remote set, start to fetch the shards of the next. What fails here fails again, and is reported, on
        use.
        """
        if self._fetching is None:
            return
        for index, seen in enumerate(self._order.consumed(self._requested)):
            store, order = self._stores[index], self._order.sources[index]
            block = order.block_at(seen)
            if store.location.remote and block != self._blocks[index]:
                self._blocks[index] = block
                self._fetching.submit(store.fetch, order.shards_after(*block))

    def _make(self, samples: NDArray[np.int64]) -> Batch:
        sources = np.searchsorted(self._order.firsts, samples, side="right") - 1
        local = samples - self._order.firsts[sources]
        windows = [self._stores[source][sample] for source, sample in zip(sources.tolist(), local.tolist(), strict=True)]
        return make_batch(windows, samples, self.sequence_length, self.manifest.bos_id, self._vocabulary_limit)


class ValidationLoader:
    """A split in its stored order, each time the same; every rank gets the same number of micro-batches, the last ones filled with
    padding rows.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = VALIDATION,
        *,
        sequence_length: int | None = None,
        micro_batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        limit_tokens: int | None = None,
        cache: str | Path | None = None,
        vocabulary_limit: int | None = None,
    ) -> None:
        """limit_tokens: read only as many whole windows as have at most this many targets (at least one window)."""
        _check_slice(micro_batch, data_rank, data_ranks)
        self._store = Store(path, split, cache)
        self.sequence_length = _checked_length(self._store, sequence_length)
        _check_vocabulary([self._store], vocabulary_limit)
        self._micro_batch, self._data_rank, self._data_ranks, self._limit = micro_batch, data_rank, data_ranks, vocabulary_limit
        self.samples = self._store.samples
        if limit_tokens is not None:
            self.samples = min(self.samples, max(1, limit_tokens // self.sequence_length))

    @property
    def manifest(self) -> Manifest:
        """Of the set."""
        return self._store.manifest

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.samples // (self._micro_batch * self._data_ranks))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            start = (step * self._data_ranks + self._data_rank) * self._micro_batch
            samples = np.arange(start, start + self._micro_batch)
            samples[samples >= self.samples] = -1
            nothing = np.empty(0, np.int64)
            windows = [self._store[sample] if sample >= 0 else nothing for sample in samples.tolist()]
            yield make_batch(windows, samples, self.sequence_length, self.manifest.bos_id, self._limit)


def _check_slice(micro_batch: int, data_rank: int, data_ranks: int) -> None:
    if micro_batch < 1:
        raise Refusal(f"train.micro_batch is {micro_batch}: a forward pass needs at least one sequence.")
    if not 0 <= data_rank < data_ranks:
        raise ValueError(f"data rank {data_rank} of {data_ranks}")


def _check_weights(stores: list[Store], weights: list[float]) -> None:
    for store, weight in zip(stores, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise Refusal(
                f"The weight of {store.location} in data.path is {weight}. Give each set a positive weight, or leave the set out."
            )


def _check_alike(stores: list[Store]) -> None:
    """Sets of one mixture share tokenizer, dtype and length."""
    first = stores[0]
    for store in stores[1:]:
        for field, remedy in (
            ("tokenizer_fingerprint", f"Prepare them with one tokenizer: --tokenizer {first.location}/tokenizer.json."),
            ("dtype", "Prepare them with one tokenizer."),
            ("sequence_length", "Prepare them with one --sequence-length."),
        ):
            ours, theirs = getattr(first.manifest, field), getattr(store.manifest, field)
            if ours != theirs:
                raise Refusal(
                    f"{first.location} and {store.location} cannot be mixed: their {field} differs ({ours} and {theirs}). {remedy}"
                )


def _checked_length(store: Store, sequence_length: int | None) -> int:
    prepared = store.manifest.sequence_length
    if sequence_length is not None and sequence_length != prepared:
        raise Refusal(
            f"data.sequence_length is {sequence_length}, but {store.location} was prepared with windows for {prepared}. "
            f"Set data.sequence_length={prepared} (or leave it out), or prepare the data again with --sequence-length {sequence_length}."
        )
    return prepared


def _check_vocabulary(stores: list[Store], limit: int | None) -> None:
    """By the manifests, before a shard is read; each batch is looked at too."""
    for store in stores:
        if limit is not None and store.split.largest_id >= limit:
            raise past_vocabulary(store.split.largest_id, store.split.largest_id_sample, limit, str(store.location))


def _describe(sources: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{source['samples']} samples at weight {source['weight']:g} ({source['index'][:8]})" for source in sources)
