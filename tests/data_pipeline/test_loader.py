"""The loader: every token once an epoch, whatever the ranks and workers; exact resume; mixtures; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import Batch, TokenLoader, ValidationLoader, open_manifest
from data_pipeline.batches import IGNORED, make_batch
from data_pipeline.errors import Refusal
from tests.data_pipeline.sets import BOS, random_documents, windows_of, write_set


def loader(folder: Path, **changes: object) -> TokenLoader:
    options = {"sequence_length": 16, "micro_batch": 4, "seed": 3} | changes
    return TokenLoader([(folder, 1.0)], **options)  # type: ignore[arg-type]


def read(source: Iterator[Batch], steps: int) -> list[list[int]]:
    return [next(source).sample_ids.tolist() for _ in range(steps)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(1, 499), max_size=60), min_size=1, max_size=30),
    st.integers(1, 20),
    st.sampled_from(["uint16", "uint32"]),
    st.sampled_from([(1, 0), (1, 2), (2, 0), (3, 2)]),
)
def test_pack_shard_load_gives_every_token_of_every_document_once(
    texts: list[list[int]], sequence_length: int, dtype: str, layout: tuple[int, int]
) -> None:
    """Through real shards: one epoch of all ranks, put in the order of the samples, is the documents end to end."""
    ranks, workers = layout
    documents = [np.array([BOS, *text], dtype) for text in texts]
    with TemporaryDirectory() as name:
        folder = write_set(Path(name), documents, sequence_length=sequence_length, dtype=dtype, shard_bytes=400)
        samples = open_manifest(folder).splits["train"].windows
        seen: dict[int, list[int]] = {}
        for rank in range(ranks):
            mine = loader(folder, sequence_length=sequence_length, micro_batch=2, data_rank=rank, data_ranks=ranks, workers=workers)
            for step in range(-(-samples // (2 * ranks))):
                for row, (sample, window) in enumerate(windows_of(next(mine))):
                    if (step * ranks + rank) * 2 + row < samples:  # the rest belongs to the next epoch
                        assert sample not in seen
                        seen[sample] = window
            mine.close()
    assert sorted(seen) == list(range(samples))
    assert [token for sample in range(samples) for token in seen[sample]] == np.concatenate(documents).tolist()


def test_targets_documents_and_padding() -> None:
    windows = [np.array([5, BOS, 7, BOS, 9], np.uint16), np.array([BOS, 8, 3], np.uint16), np.array([4], np.uint16), np.empty(0, np.uint16)]
    batch = make_batch(windows, np.array([0, 1, 2, -1]), 4, BOS, 10)
    assert batch.tokens.tolist() == [[5, BOS, 7, BOS], [BOS, 8, 3, BOS], [4, BOS, BOS, BOS], [BOS] * 4]
    assert batch.targets.tolist() == [[BOS, 7, BOS, 9], [8, 3, IGNORED, IGNORED], [IGNORED] * 4, [IGNORED] * 4]
    assert batch.documents.tolist() == [[0, 1, 1, 2], [1, 1, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.int32, torch.int64]
    assert all(part.is_contiguous() for part in batch)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_two_ranks_read_what_one_rank_reads_with_twice_the_batch(small_set: Path, workers: int) -> None:
    one = loader(small_set, micro_batch=8)
    two = [loader(small_set, data_rank=rank, data_ranks=2, workers=workers) for rank in range(2)]
    accumulated = loader(small_set, micro_batch=4)
    for _ in range(60):
        whole = next(one)
        halves = [next(rank) for rank in two]
        again = [next(accumulated) for _ in range(2)]
        for name in Batch._fields:
            expected = getattr(whole, name)
            assert torch.equal(expected, torch.cat([getattr(half, name) for half in halves]))
            assert torch.equal(expected, torch.cat([getattr(half, name) for half in again]))
    for rank in two:
        rank.close()


def test_epochs_are_counted_and_each_has_every_sample(small_set: Path) -> None:
    samples = open_manifest(small_set).splits["train"].windows
    mine = loader(small_set, micro_batch=1)
    for epoch in range(3):
        assert mine.epoch == epoch
        assert sorted(sample for [sample] in read(mine, samples)) == list(range(samples))
    assert mine.epoch == 3


def test_the_seed_decides_the_order(small_set: Path) -> None:
    assert read(loader(small_set), 20) == read(loader(small_set), 20)
    assert read(loader(small_set), 20) != read(loader(small_set, seed=4), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_any_number_of_times_also_over_the_end_of_an_epoch(small_set: Path, workers: int) -> None:
    samples = open_manifest(small_set).splits["train"].windows
    steps = 2 * samples // 4 + 11
    whole = read(loader(small_set), steps)
    for legs in ([10, 10], [7, 6, 7], [samples // 4 - 1, 2, 3], [samples // 4, samples // 4, 5, 0, 6]):
        state, seen = None, []
        for leg in legs:
            mine = loader(small_set, workers=workers)
            if state is not None:
                mine.load_state_dict(json.loads(json.dumps(state)))
            seen += read(mine, leg)
            state = mine.state_dict()
            mine.close()
        assert seen == whole[: len(seen)]


def test_the_state_counts_what_was_handed_out_and_not_what_was_fetched_ahead(small_set: Path) -> None:
    with_workers, without = loader(small_set, workers=2), loader(small_set)
    for _ in range(5):
        assert torch.equal(next(with_workers).tokens, next(without).tokens)
        assert with_workers.state_dict() == without.state_dict()
    assert with_workers.state_dict()["samples"] == 20
    with_workers.close()


def test_a_loader_can_be_set_back(small_set: Path) -> None:
    mine = loader(small_set, workers=2)
    read(mine, 3)
    state = mine.state_dict()
    after = read(mine, 4)
    mine.load_state_dict(state)
    assert read(mine, 4) == after
    mine.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_the_same_batch_is_next(small_set: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    expected = read(loader(small_set), 9)
    mine = loader(small_set, workers=workers)
    seen = read(mine, 4)
    state = mine.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.store.Store.__getitem__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(mine, 9)
    assert mine.state_dict()["samples"] >= state["samples"]
    at = mine.state_dict()["samples"] // 4
    assert seen + read(mine, 9 - at) == expected[:4] + expected[at:]
    mine.close()


def test_a_state_holds_for_another_layout(small_set: Path) -> None:
    whole = read(loader(small_set, micro_batch=8), 12)
    mine = loader(small_set, micro_batch=8)
    read(mine, 5)
    ranks = [loader(small_set, micro_batch=2, data_rank=rank, data_ranks=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(mine.state_dict())
    for step in range(5, 12):
        assert [sample for rank in ranks for sample in next(rank).sample_ids.tolist()] == whole[step]


def test_the_state_of_other_data_or_another_seed_is_refused(small_set: Path, tmp_path: Path) -> None:
    state = loader(small_set).state_dict()
    other = write_set(tmp_path / "other", random_documents(30, seed=9))
    with pytest.raises(Refusal, match="belongs to other data"):
        loader(other).load_state_dict(state)
    with pytest.raises(Refusal, match=r"saved with seed 3 .*now there is seed 4"):
        loader(small_set, seed=4).load_state_dict(state)
    with pytest.raises(Refusal, match="at weight 2"):
        TokenLoader([(small_set, 2.0)], micro_batch=4, seed=3).load_state_dict(state)
    with pytest.raises(Refusal, match="format 99"):
        loader(small_set).load_state_dict(state | {"format": 99})


def test_the_environment_of_a_launcher_does_not_matter(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(loader(small_set), 10)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "203.0.113.1"}.items():
        monkeypatch.setenv(name, value)
    assert read(loader(small_set), 10) == expected


@pytest.fixture(scope="module")
def three_sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mixture")
    return [
        write_set(root / name, random_documents(count, seed=seed))
        for seed, (name, count) in enumerate({"a": 40, "b": 100, "c": 15}.items())
    ]


def test_a_mixture_has_its_shares_and_each_set_its_own_epochs(three_sets: list[Path]) -> None:
    sizes = [open_manifest(path).splits["train"].windows for path in three_sets]
    mine = TokenLoader(list(zip(three_sets, [1.0, 2.0, 5.0], strict=True)), micro_batch=8, seed=1)
    samples = np.concatenate([np.array(row) for row in read(mine, 256)])
    counts = np.bincount(np.searchsorted(np.cumsum(sizes), samples, side="right"), minlength=3)
    assert np.abs(counts - len(samples) * np.array([1, 2, 5]) / 8).max() < 3
    assert mine.epochs == [count // size for count, size in zip(counts.tolist(), sizes, strict=True)]
    assert mine.epoch == min(mine.epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_is_deterministic_resumable_and_split_over_ranks(three_sets: list[Path], workers: int) -> None:
    def mixture(**options: int) -> TokenLoader:
        return TokenLoader(list(zip(three_sets, [0.5, 0.3, 0.2], strict=True)), seed=1, **options)  # type: ignore[arg-type]

    whole = read(mixture(micro_batch=6), 400)
    ranks = [mixture(micro_batch=2, data_rank=rank, data_ranks=3, workers=workers) for rank in range(3)]
    first = [[sample for rank in ranks for sample in next(rank).sample_ids.tolist()] for _ in range(170)]
    resumed = [mixture(micro_batch=2, data_rank=rank, data_ranks=3, workers=workers) for rank in range(3)]
    for old, new in zip(ranks, resumed, strict=True):
        new.load_state_dict(old.state_dict())
        old.close()
    second = [[sample for rank in resumed for sample in next(rank).sample_ids.tolist()] for _ in range(230)]
    assert first + second == whole
    for rank in resumed:
        rank.close()


def test_sample_ids_tell_the_set_and_the_window(three_sets: list[Path]) -> None:
    alone = [windows for path in three_sets for windows in _all_windows(path)]
    mine = TokenLoader([(path, 1.0) for path in three_sets], micro_batch=16)
    for _ in range(20):
        for sample, window in windows_of(next(mine)):
            assert window == alone[sample]


def _all_windows(path: Path) -> list[list[int]]:
    return [window for batch in ValidationLoader(path, "train", micro_batch=1) for _, window in windows_of(batch)]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 7), (2, 3), (5, 4)])
def test_validation_reads_all_in_order_with_equal_steps_on_every_rank(small_set: Path, ranks: int, micro_batch: int) -> None:
    split = open_manifest(small_set).splits["validation"]
    loaders = [
        ValidationLoader(small_set, sequence_length=16, micro_batch=micro_batch, data_rank=rank, data_ranks=ranks) for rank in range(ranks)
    ]
    batches = [list(each) for each in loaders]
    assert {len(each) for each in batches} == {len(each) for each in loaders} == {-(-split.windows // (ranks * micro_batch))}
    order = [sample for step in zip(*batches, strict=True) for batch in step for sample in batch.sample_ids.tolist()]
    assert order == list(range(split.windows)) + [-1] * (len(order) - split.windows)
    counted = sum(int((batch.targets != IGNORED).sum()) for each in batches for batch in each)
    assert counted == split.tokens - split.windows
    for batch in (batch for each in batches for batch in each):
        assert (batch.targets[batch.sample_ids < 0] == IGNORED).all()
        assert batch.tokens.shape == (micro_batch, 16)


def test_validation_can_be_limited_and_repeated(small_set: Path) -> None:
    limited = ValidationLoader(small_set, micro_batch=2, limit_tokens=100)
    assert limited.samples == 6
    assert len(limited) == 3
    assert [batch.sample_ids.tolist() for batch in limited] == [batch.sample_ids.tolist() for batch in limited] == [[0, 1], [2, 3], [4, 5]]
    assert ValidationLoader(small_set, micro_batch=2, limit_tokens=1).samples == 1
    assert ValidationLoader(small_set, micro_batch=2, limit_tokens=10**9).samples == open_manifest(small_set).splits["validation"].windows


def test_ids_past_the_vocabulary_are_refused_before_a_shard_is_read(small_set: Path) -> None:
    split = open_manifest(small_set).splits["train"]
    loader(small_set, vocabulary_limit=split.largest_id + 1)
    with pytest.raises(Refusal, match=rf"token id {split.largest_id} \(sample {split.largest_id_sample}\).*ends at {split.largest_id}"):
        loader(small_set, vocabulary_limit=split.largest_id)
    held = open_manifest(small_set).splits["validation"].largest_id
    with pytest.raises(Refusal, match=f"token id {held}"):
        ValidationLoader(small_set, micro_batch=1, vocabulary_limit=held)


def test_ids_past_the_vocabulary_are_found_in_a_batch_too() -> None:
    windows = [np.array([1, 2, 3]), np.array([1, 700, 3])]
    with pytest.raises(Refusal, match=r"token id 700 \(sample 41\).*ends at 500.*at least 701"):
        make_batch(windows, np.array([40, 41]), 2, BOS, 500)


def test_another_sequence_length_is_refused_with_both_remedies(small_set: Path) -> None:
    for make in (lambda: loader(small_set, sequence_length=32), lambda: ValidationLoader(small_set, sequence_length=32, micro_batch=1)):
        with pytest.raises(Refusal, match=r"sequence_length is 32.*windows for 16.*data\.sequence_length=16.*--sequence-length 32"):
            make()
    assert loader(small_set, sequence_length=None).sequence_length == 16


def test_sets_that_cannot_be_mixed_are_refused(small_set: Path, tmp_path: Path) -> None:
    documents = random_documents(5)
    others = {
        "tokenizer_fingerprint": write_set(tmp_path / "tokenizer", documents, tokenizer='{"other": 1}'),
        "dtype": write_set(tmp_path / "dtype", documents, dtype="uint32"),
        "sequence_length": write_set(tmp_path / "length", documents, sequence_length=8),
    }
    for field, other in others.items():
        with pytest.raises(Refusal, match=f"{small_set} and {other} cannot be mixed: their {field} differs"):
            TokenLoader([(small_set, 1.0), (other, 1.0)], micro_batch=1)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [([], {}, "No prepared set"), ([0.0], {}, "weight"), ([1.0], {"micro_batch": 0}, "at least one sequence")],
)
def test_bad_arguments_are_refused(small_set: Path, sources: list[float], options: dict[str, int], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        TokenLoader([(small_set, weight) for weight in sources], **({"micro_batch": 1} | options))  # type: ignore[arg-type]


def test_a_data_rank_outside_the_layout_is_a_bug(small_set: Path) -> None:
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        loader(small_set, data_rank=2, data_ranks=2)
