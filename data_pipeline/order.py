"""The order in which samples are read: a function of (seed, epoch), of nothing else, and computable from any position.

One set. An epoch visits every sample once. Its shards are permuted and taken `BLOCK` at a time; the samples of a block are permuted among
themselves. So at any time only the shards of a block are needed, in memory and from a remote store, and a permutation of billions of
samples is never held.

A mixture. Positions come in rounds of ROUND. With cumulative shares W_0 = 0 ... W_n = 1 and u uniform in [0, 1), drawn for each round,
source s gets this many positions of a round (systematic sampling), in an order permuted for each round:

    ceil(ROUND W_s - u) - ceil(ROUND W_{s-1} - u)        on average exactly its share, never off by one or more

The j-th position of a source, over all rounds, is the j-th sample of its own endless row of epochs.

Random numbers are raw outputs of numpy's Philox, which numpy guarantees never to change; permutations are a stable argsort of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # shards of a shuffle block: 128 MB of ids in memory, 64M tokens of uint16
ROUND = 1024  # positions of a mixture's round

_SHARDS, _SAMPLES, _OFFSETS, _POSITIONS = range(4)  # what a stream of random numbers is for


def _raw(purpose: int, *key: int, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers of the stream named by `purpose` and `key` (non-negative)."""
    return np.random.Philox(np.random.SeedSequence([purpose, *key])).random_raw(count)


def _permutation(purpose: int, *key: int, count: int) -> NDArray[np.int64]:
    return np.argsort(_raw(purpose, *key, count=count), kind="stable")


class SetOrder:
    """The endless row of one set's samples, by local index: sample i of shard k is the samples of the shards before k, plus i."""

    def __init__(self, samples_per_shard: Sequence[int], seed: int, source: int = 0, block: int = BLOCK) -> None:
        self._sizes = np.asarray(samples_per_shard, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._source, self._block = seed, source, block
        self.samples = int(self._sizes.sum())
        self._epoch = -1  # whose shards are in order in _shards; their samples end at _ends
        self._shards = self._ends = np.empty(0, np.int64)
        self._held = (-1, -1)  # epoch and block whose samples are in order in _block_samples
        self._block_samples = np.empty(0, np.int64)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Local indices [count] at positions start .. start + count - 1."""
        found = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, at = divmod(start + filled, self.samples)
            first, order = self._samples_from(epoch, self._block_of(epoch, at))
            part = order[at - first : at - first + count - filled]
            found[filled : filled + len(part)] = part
            filled += len(part)
        return found

    def block_at(self, position: int) -> tuple[int, int]:
        """(epoch, block) that `position` is in."""
        epoch, at = divmod(position, self.samples)
        return epoch, self._block_of(epoch, at)

    def shards_after(self, epoch: int, block: int) -> list[int]:
        """The shards of the block that follows this one."""
        if (block + 1) * self._block >= len(self._sizes):
            epoch, block = epoch + 1, -1
        return self._shards_of(epoch, block + 1).tolist()

    def _block_of(self, epoch: int, at: int) -> int:
        self._enter(epoch)
        return int(np.searchsorted(self._ends, at, side="right")) // self._block

    def _enter(self, epoch: int) -> None:
        """Permute the shards of an epoch."""
        if epoch != self._epoch:
            self._shards = _permutation(_SHARDS, self._seed, self._source, epoch, count=len(self._sizes))
            self._ends = np.cumsum(self._sizes[self._shards])
            self._epoch = epoch

    def _shards_of(self, epoch: int, block: int) -> NDArray[np.int64]:
        self._enter(epoch)
        return self._shards[block * self._block : (block + 1) * self._block]

    def _samples_from(self, epoch: int, block: int) -> tuple[int, NDArray[np.int64]]:
        """(position in the epoch of the block's first sample, its samples in order)."""
        shards = self._shards_of(epoch, block)
        if self._held != (epoch, block):
            samples = np.concatenate([np.arange(self._starts[shard], self._starts[shard] + self._sizes[shard]) for shard in shards])
            self._block_samples = samples[_permutation(_SAMPLES, self._seed, self._source, epoch, block, count=len(samples))]
            self._held = (epoch, block)
        return int(self._ends[block * self._block - 1]) if block else 0, self._block_samples


class MixtureOrder:
    """The endless row of a mixture's samples, by global index: the sources' samples counted one source after the other."""

    def __init__(self, sources: Sequence[SetOrder], weights: Sequence[float], seed: int) -> None:
        if len(sources) != len(weights) or not sources or min(weights) <= 0:
            raise ValueError(f"a mixture needs a positive weight for each of its {len(sources)} sources, not {list(weights)}")
        self.sources = list(sources)
        self.firsts = np.cumsum([0, *(source.samples for source in sources)])  # global index of each source's first sample; last: of all
        self._bounds = np.cumsum([0.0, *weights]) / sum(weights)
        self._bounds[-1] = 1.0
        self._seed = seed
        self._totals = np.zeros((1, len(sources)), np.int64)  # [rounds + 1, sources]: positions of each source before each round

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Global indices [count] at positions start .. start + count - 1."""
        if len(self.sources) == 1:
            return self.sources[0].read(start, count)
        found = []
        while count:
            round_, skip = divmod(start, ROUND)
            take = min(count, ROUND - skip)
            found.append(self._read_round(round_, skip, take))
            start, count = start + take, count - take
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def consumed(self, position: int) -> list[int]:
        """How many of the positions before `position` each source has."""
        if len(self.sources) == 1:
            return [position]
        round_, skip = divmod(position, ROUND)
        counts = np.bincount(self._choices(round_)[:skip], minlength=len(self.sources))
        return (self._totals[round_] + counts).tolist()

    def _read_round(self, round_: int, skip: int, take: int) -> NDArray[np.int64]:
        choices = self._choices(round_)
        found = np.empty(take, np.int64)
        for index, source in enumerate(self.sources):
            before = int(np.count_nonzero(choices[:skip] == index))
            mine = np.flatnonzero(choices[skip : skip + take] == index)
            if len(mine):
                found[mine] = self.firsts[index] + source.read(int(self._totals[round_, index]) + before, len(mine))
        return found

    def _choices(self, round_: int) -> NDArray[np.int64]:
        """The source [ROUND] of each position of a round."""
        while len(self._totals) < round_ + 2:
            self._count_rounds(max(2 * len(self._totals), round_ + 1))
        counts = self._totals[round_ + 1] - self._totals[round_]
        return np.repeat(np.arange(len(self.sources)), counts)[_permutation(_POSITIONS, self._seed, round_, count=ROUND)]

    def _count_rounds(self, rounds: int) -> None:
        """Extend the running totals to `rounds` rounds."""
        offsets = (_raw(_OFFSETS, self._seed, count=rounds) >> np.uint64(11)) * 2.0**-53
        ends = np.ceil(ROUND * self._bounds[None, :] - offsets[:, None]).astype(np.int64)
        totals = np.cumsum(np.diff(ends, axis=1), axis=0)
        self._totals = np.concatenate([np.zeros((1, len(self.sources)), np.int64), totals])
