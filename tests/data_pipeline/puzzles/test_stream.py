"""The stream: a pure function of the position; the set: what was prepared; both wherever the files live."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import StreamingDataset

from data_pipeline.errors import Refusal
from data_pipeline.puzzles import PuzzleSet, PuzzleStream, maze_valid_and_shortest, open_puzzles, sudoku_valid
from data_pipeline.puzzles.stream import PuzzleBatch


def same(one: PuzzleBatch, other: PuzzleBatch) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def part(batch: PuzzleBatch, start: int, end: int) -> PuzzleBatch:
    return PuzzleBatch(*(column[start:end] for column in batch))


def test_what_stands_at_a_position_depends_on_nothing_else(sudokus: Path) -> None:
    whole = PuzzleStream(sudokus, seed=3).read(0, 200)
    resumed = PuzzleStream(sudokus, seed=3)
    for start, end in ((150, 200), (0, 7), (59, 61), (119, 121), (7, 7)):
        assert same(resumed.read(start, end - start), part(whole, start, end))


def test_ranks_deal_out_the_same_row(sudokus: Path) -> None:
    whole = PuzzleStream(sudokus).read(0, 96)
    for ranks in (1, 2, 4):
        stream, each = PuzzleStream(sudokus), 96 // ranks
        dealt = [stream.read(rank * each, each) for rank in range(ranks)]
        assert same(PuzzleBatch(*(torch.cat(columns) for columns in zip(*dealt, strict=True))), whole)


def test_each_epoch_visits_each_puzzle_once_and_changes_it(sudokus: Path) -> None:
    stream, held = PuzzleStream(sudokus), PuzzleSet(sudokus, "train")
    epochs = [stream.read(epoch * 60, 60) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.index.tolist()) == list(range(60))
        assert torch.equal(epoch.ratings, held.ratings[epoch.index])
        assert sudoku_valid(epoch.answers, (2, 3)).all()
    orders = [epoch.index.tolist() for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    first, second = (epoch.inputs[epoch.index.argsort()] for epoch in epochs[:2])
    assert not (first == second).all(1).any()


def test_without_augmentation_only_the_order_is_random(mazes: Path) -> None:
    held = PuzzleSet(mazes, "train")
    batch = PuzzleStream(mazes, augment=False, seed=1).read(0, 30)
    assert same(batch, held.batch(batch.index))
    changed = PuzzleStream(mazes, seed=1).read(0, 30)
    assert torch.equal(changed.index, batch.index)
    assert maze_valid_and_shortest(changed.inputs, changed.answers, 8).all()
    assert not torch.equal(changed.inputs, batch.inputs)


def test_shapes_types_and_manifest(sudokus: Path) -> None:
    batch, manifest = PuzzleStream(sudokus).read(0, 5), open_puzzles(sudokus)
    assert [column.dtype for column in batch] == [torch.uint8, torch.uint8, torch.int64, torch.int32, torch.int64]
    assert [list(column.shape) for column in batch] == [[5, 36], [5, 36], [5], [5], [5]]
    assert (manifest.game, manifest.height, manifest.width, manifest.box) == ("sudoku", 6, 6, (2, 3))
    assert (manifest.cells, manifest.vocabulary_size, manifest.identifiers) == (36, 8, 1)
    held = PuzzleSet(sudokus)
    assert len(held) == manifest.splits["validation"].puzzles == 20
    assert held.batch(slice(3, 6)).index.tolist() == [3, 4, 5]


def test_identity_tells_streams_apart(sudokus: Path, mazes: Path) -> None:
    streams = [
        PuzzleStream(sudokus),
        PuzzleStream(sudokus, seed=1),
        PuzzleStream(sudokus, augment=False),
        PuzzleStream(sudokus, split="validation"),
        PuzzleStream(mazes),
    ]
    assert len({str(stream.identity()) for stream in streams}) == 5
    assert PuzzleStream(sudokus).identity() == streams[0].identity()


def test_a_remote_set_is_mirrored(sudokus: Path, tmp_path: Path) -> None:
    remote = PuzzleStream(f"file://{sudokus}", cache=tmp_path / "cache")
    assert same(remote.read(5, 70), PuzzleStream(sudokus).read(5, 70))
    assert list((tmp_path / "cache").rglob("shard.*.zstd"))
    with pytest.raises(Refusal, match=r"data\.cache"):
        PuzzleStream("s3://bucket/set")


def test_streaming_reads_our_shards(sudokus: Path) -> None:
    held = PuzzleSet(sudokus, "train")
    found = StreamingDataset(local=str(sudokus / "train"), shuffle=False, batch_size=1)
    for row in (0, 31, 59):
        sample = found[row]
        assert np.array_equal(sample["inputs"], held.inputs[row].numpy())
        assert np.array_equal(sample["answers"], held.answers[row].numpy())
        assert sample["rating"] == held.ratings[row]


def test_a_set_that_is_none_and_a_split_that_is_none(sudokus: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="not a finished set of puzzles"):
        PuzzleStream(tmp_path)
    with pytest.raises(Refusal, match="no split 'test', only train, validation"):
        PuzzleSet(sudokus, "test")


def test_a_damaged_shard_is_named(sudokus: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(sudokus, tmp_path / "set")
    shard = sorted((broken / "train").glob("shard.*"))[1]
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(Refusal, match=f"{shard.name} has another xxh64"):
        PuzzleStream(broken)
