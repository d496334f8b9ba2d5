"""Damage of any kind is found and named, by verify, when a set is opened, or when a shard is read; streaming itself can read the shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import TokenLoader, ValidationLoader, open_manifest, verify
from data_pipeline.errors import Refusal
from data_pipeline.store import Store
from tests.data_pipeline.sets import random_documents, write_set


@pytest.fixture
def copy(small_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "copy"))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = [(remove, "is missing"), (truncate, "bytes instead of"), (flip_bit, "has another")]
SECOND = "shard.00001.mds.zstd"


def read_all(folder: Path, workers: int = 0) -> None:
    loader = TokenLoader([(folder, 1.0)], micro_batch=4, workers=workers)
    try:
        while loader.epoch < 1:
            next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize(("damage", "what"), DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_by_the_loader(copy: Path, damage: Callable[[Path], None], what: str, workers: int) -> None:
    read_all(copy, workers)
    damage(copy / "train" / SECOND)
    with pytest.raises(Refusal, match=f"{copy}/train/{SECOND} .*{what}.*verify"):
        read_all(copy, workers)


@pytest.mark.parametrize(("damage", "what"), DAMAGE)
def test_a_damaged_shard_is_named_by_the_validation_loader(copy: Path, damage: Callable[[Path], None], what: str) -> None:
    damage(copy / "validation" / "shard.00000.mds.zstd")
    with pytest.raises(Refusal, match=rf"validation/shard\.00000\.mds\.zstd .*{what}"):
        list(ValidationLoader(copy, micro_batch=2))


@pytest.mark.parametrize(("damage", "what"), DAMAGE[:2])
def test_missing_and_truncated_shards_are_found_on_opening(copy: Path, damage: Callable[[Path], None], what: str) -> None:
    damage(copy / "train" / SECOND)
    with pytest.raises(Refusal, match=what):
        TokenLoader([(copy, 1.0)], micro_batch=4)


def test_verify_finds_a_sound_set_sound(small_set: Path) -> None:
    manifest, report = open_manifest(small_set), verify(small_set)
    assert report.splits == ["train", "validation"]
    assert report.tokens == sum(split.tokens for split in manifest.splits.values())
    assert report.windows == sum(split.windows for split in manifest.splits.values())
    assert report.bytes == sum(path.stat().st_size for path in small_set.rglob("*.zstd"))
    assert report.shards == len(list(small_set.rglob("*.zstd"))) > 4


def test_verify_names_every_damaged_shard(copy: Path) -> None:
    for number, (damage, _) in enumerate(DAMAGE):
        damage(copy / "train" / f"shard.0000{number}.mds.zstd")
    flip_bit(copy / "validation" / "shard.00000.mds.zstd")
    with pytest.raises(Refusal) as refusal:
        verify(copy)
    message = str(refusal.value)
    for number, (_, what) in enumerate(DAMAGE):
        assert f"train/shard.0000{number}.mds.zstd" in message
        assert what in message
    assert "validation/shard.00000.mds.zstd" in message
    assert "00003" not in message


def test_a_shard_of_right_size_and_hash_with_other_samples_is_found(copy: Path) -> None:
    """An index that lies about its shards: both were changed, and the manifest with them."""
    index = copy / "train" / "index.json"
    parsed = json.loads(index.read_text())
    parsed["shards"][0]["samples"] += 1
    index.write_text(json.dumps(parsed))
    with pytest.raises(Refusal, match=r"train/index\.json is not the index that the manifest was written with"):
        verify(copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(
        text.replace(open_manifest(copy).splits["train"].index_sha256, hashlib.sha256(index.read_bytes()).hexdigest())
    )
    with pytest.raises(Refusal, match=r"shard\.00000\.mds\.zstd holds \d+ samples"):
        verify(copy)


def test_verify_compares_the_counts_of_the_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    tokens = open_manifest(copy).splits["train"].tokens
    (copy / "manifest.json").write_text(text.replace(f'"tokens": {tokens}', f'"tokens": {tokens + 1}'))
    with pytest.raises(Refusal, match=f"train has {tokens} as its tokens, the manifest says {tokens + 1}"):
        verify(copy)


def test_a_folder_without_a_manifest_is_not_a_finished_set(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    for open_it in (verify, open_manifest, lambda path: TokenLoader([(path, 1.0)], micro_batch=1)):
        with pytest.raises(Refusal, match=r"is not a finished prepared set.*attractor data prepare"):
            open_it(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_manifest_that_is_damaged_or_of_another_version_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(Refusal, match=r"manifest\.json is not a manifest this version can read"):
        open_manifest(copy)


def test_another_tokenizer_beside_the_shards_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"other": 1}')
    for open_it in (verify, lambda path: TokenLoader([(path, 1.0)], micro_batch=1), lambda path: ValidationLoader(path, micro_batch=1)):
        with pytest.raises(Refusal, match=r"tokenizer\.json is not the tokenizer that the shards were encoded with"):
            open_it(copy)


def test_shards_of_another_preparation_are_refused(copy: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other", random_documents(30, seed=9))
    shutil.rmtree(copy / "train")
    shutil.copytree(other / "train", copy / "train")
    with pytest.raises(Refusal, match=r"another preparation"):
        TokenLoader([(copy, 1.0)], micro_batch=1)
    (copy / "train" / "index.json").unlink()
    with pytest.raises(Refusal, match=r"index\.json is missing"):
        TokenLoader([(copy, 1.0)], micro_batch=1)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", random_documents(5))
    with pytest.raises(Refusal, match=r"has no split 'validation', only train.*--validation"):
        ValidationLoader(folder, micro_batch=1)


def test_a_read_only_folder_is_only_read(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]}
    read_all(copy, workers=2)
    verify(copy)
    assert {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]} == before


def test_few_shards_are_held_and_the_samples_are_right_in_any_order(small_set: Path) -> None:
    whole = Store(small_set, "train", hold=1000)
    few = Store(small_set, "train", hold=2)
    for sample in np.random.default_rng(0).permutation(few.samples).tolist():
        assert few[sample].tolist() == whole[sample].tolist()
        assert len(few._kept) <= 2


def test_streaming_reads_the_shards_too(copy: Path) -> None:
    from streaming import StreamingDataset

    store = Store(copy, "train")
    dataset = StreamingDataset(local=str(copy / "train"), batch_size=1, shuffle=False)
    assert len(dataset) == store.samples
    assert all(dataset[sample]["tokens"].tolist() == store[sample].tolist() for sample in range(store.samples))
