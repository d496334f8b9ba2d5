"""The order is a permutation each epoch, the same from any position, and a mixture keeps its shares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import ROUND, MixtureOrder, SetOrder

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(sizes, st.integers(0, 2**31), st.integers(1, 5))
def test_each_epoch_visits_every_sample_once(shards: list[int], seed: int, block: int) -> None:
    order = SetOrder(shards, seed, block=block)
    for epoch in range(3):
        assert sorted(order.read(epoch * order.samples, order.samples)) == list(range(sum(shards)))


@given(sizes, st.integers(1, 4), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=6))
def test_any_position_can_be_read_at_any_time(shards: list[int], block: int, reads: list[tuple[int, int]]) -> None:
    whole = SetOrder(shards, 3, block=block).read(0, 460)
    order = SetOrder(shards, 3, block=block)
    for start, count in reads:
        assert order.read(start, count).tolist() == whole[start : start + count].tolist()


def test_epochs_and_seeds_and_sources_differ() -> None:
    rows = [
        SetOrder([50, 50], seed, source).read(epoch * 100, 100).tolist()
        for seed, source, epoch in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]
    ]
    assert len({tuple(row) for row in rows}) == 4


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """A resumed run depends on these numbers: a change of them is a change of format."""
    assert SetOrder([5, 5, 5], 1, block=2).read(0, 15).tolist() == [8, 6, 13, 7, 5, 9, 11, 10, 14, 12, 2, 4, 1, 0, 3]
    mixture = MixtureOrder([SetOrder([5, 5], 1, 0), SetOrder([5], 1, 1)], [1, 1], 1)
    assert mixture.read(0, 12).tolist() == [3, 1, 8, 2, 12, 0, 13, 4, 6, 10, 5, 9]


@given(sizes, st.integers(1, 4))
def test_a_block_reads_only_the_shards_that_were_announced(shards: list[int], block: int) -> None:
    order = SetOrder(shards, 7, block=block)
    owner = np.repeat(np.arange(len(shards)), shards)
    positions = range(2 * order.samples)
    by_block: dict[tuple[int, int], set[int]] = {}
    for position, sample in zip(positions, order.read(0, len(positions)).tolist(), strict=True):
        by_block.setdefault(order.block_at(position), set()).add(int(owner[sample]))
    blocks = list(by_block)
    for before, after in pairwise(blocks):
        assert by_block[after] == set(order.shards_after(*before))
    assert all(len(found) <= block for found in by_block.values())
    assert len(blocks) == 2 * -(-len(shards) // block)


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(0, 1000))
def test_a_mixture_keeps_its_shares_in_every_round(weights: list[float], seed: int) -> None:
    orders = [SetOrder([40, 7], seed, index) for index in range(len(weights))]
    mixture = MixtureOrder(orders, weights, seed)
    shares = np.array(weights) / sum(weights)
    for round_ in range(4):
        source = np.searchsorted(mixture.firsts, mixture.read(round_ * ROUND, ROUND), side="right") - 1
        counts = np.bincount(source, minlength=len(weights))
        assert np.all(np.abs(counts - ROUND * shares) < 1 + 1e-6)


def test_the_shares_of_a_mixture_are_right_on_average() -> None:
    mixture = MixtureOrder([SetOrder([10], 0, index) for index in range(3)], [0.0001, 0.3, 0.7], 5)
    seen = np.array(mixture.consumed(1000 * ROUND))
    assert np.allclose(seen / seen.sum(), np.array([0.0001, 0.3, 0.7]) / 1.0001, atol=2e-5)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 700)), min_size=1, max_size=5))
@settings(max_examples=30)
def test_a_mixture_can_be_read_from_any_position(reads: list[tuple[int, int]]) -> None:
    def mixture() -> MixtureOrder:
        return MixtureOrder([SetOrder([30, 31], 2, 0), SetOrder([17], 2, 1)], [1, 2.5], 2)

    whole = mixture().read(0, 3700)
    other = mixture()
    for start, count in reads:
        assert other.read(start, count).tolist() == whole[start : start + count].tolist()


def test_each_source_of_a_mixture_repeats_by_its_own_epochs() -> None:
    mixture = MixtureOrder([SetOrder([30], 0, 0), SetOrder([200], 0, 1)], [1, 1], 0)
    row = mixture.read(0, 2 * ROUND)
    for source, size in enumerate([30, 200]):
        mine = row[(row >= mixture.firsts[source]) & (row < mixture.firsts[source + 1])] - mixture.firsts[source]
        assert len(mine) == mixture.consumed(2 * ROUND)[source]
        for start in range(0, len(mine) - size, size):
            assert sorted(mine[start : start + size]) == list(range(size))


def test_a_mixture_needs_positive_weights() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        MixtureOrder([SetOrder([3], 0), SetOrder([3], 0, 1)], [1, 0], 0)
