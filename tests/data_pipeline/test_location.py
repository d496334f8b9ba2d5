"""Remote sets: fetched file by file into a cache, shared by processes and threads, checked, and fetched ahead of use."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from streaming.base.storage import CloudDownloader

from data_pipeline import TokenLoader, ValidationLoader, open_manifest
from data_pipeline.errors import Refusal
from data_pipeline.location import Location
from data_pipeline.order import SetOrder

FETCHED = CloudDownloader.direct_download


@pytest.fixture
def remote(small_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "remote"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is downloaded, as the last two parts of its path."""
    names: list[str] = []

    def download(remote: str, local: str, timeout: float) -> None:
        names.append("/".join(remote.split("/")[-2:]))
        FETCHED(remote, local, timeout)

    monkeypatch.setattr(CloudDownloader, "direct_download", download)
    return names


def test_a_path_is_local_and_with_a_cache_remote(tmp_path: Path) -> None:
    assert Location.of(tmp_path) == Location.of(f"file://{tmp_path}") == Location(tmp_path)
    mirrored = Location.of(tmp_path, tmp_path / "cache")
    assert mirrored == Location.of(f"file://{tmp_path}", tmp_path / "cache")
    assert mirrored.remote == str(tmp_path)
    assert mirrored.folder.parent == tmp_path / "cache"
    assert Location.of("s3://bucket/set/", "cache") == Location.of("s3://bucket/set", "cache") != Location.of("gs://bucket/set", "cache")


def test_a_remote_url_needs_a_cache() -> None:
    with pytest.raises(Refusal, match=r"s3://bucket/set is remote.*data\.cache"):
        open_manifest("s3://bucket/set")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_gives_the_batches_of_the_local_one_and_each_file_is_fetched_once(
    small_set: Path, remote: Path, tmp_path: Path, fetched: list[str], workers: int
) -> None:
    here = TokenLoader([(small_set, 1.0)], micro_batch=4)
    there = TokenLoader([(remote, 1.0)], micro_batch=4, workers=workers, cache=tmp_path / "cache")
    while there.epoch < 2:
        assert next(here).sample_ids.tolist() == next(there).sample_ids.tolist()
    there.close()
    shards = [f"train/{path.name}" for path in (remote / "train").glob("*.zstd")]
    assert sorted(fetched) == sorted([*shards, "remote/manifest.json", "remote/tokenizer.json", "train/index.json"])
    list(ValidationLoader(f"file://{remote}", micro_batch=2, cache=tmp_path / "cache"))
    held = [f"validation/{path.name}" for path in sorted((remote / "validation").glob("*.zstd"))]
    assert [name for name in fetched if "validation" in name] == ["validation/index.json", *held]


def test_threads_that_want_the_same_file_fetch_it_once(remote: Path, tmp_path: Path, fetched: list[str]) -> None:
    location = Location.of(remote, tmp_path / "cache")
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(location.fetch, ["manifest.json"] * 32))
    assert paths == {location.folder / "manifest.json"}
    assert fetched == ["remote/manifest.json"]


def test_the_next_block_is_fetched_while_this_one_is_read(
    remote: Path, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SetOrder.__init__, "__defaults__", (0, 1))  # one shard a block
    loader = TokenLoader([(remote, 1.0)], micro_batch=1, workers=1, cache=tmp_path / "cache")
    order = loader._order.sources[0]
    next(loader)
    epoch, block = order.block_at(0)
    upcoming = {f"train/shard.{shard:05}.mds.zstd" for shard in order.shards_after(epoch, block)}
    assert len(upcoming) == 1
    end = time.monotonic() + 10
    while not upcoming <= set(fetched):
        assert time.monotonic() < end
        time.sleep(0.01)
    loader.close()


def test_a_bad_copy_in_the_cache_is_fetched_again(remote: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = [batch.tokens.tolist() for batch in ValidationLoader(remote, micro_batch=2, cache=cache)]
    copy = next(cache.rglob("shard.00000.mds.zstd"))
    for damage in (copy.read_bytes()[:-3], b""):
        copy.write_bytes(damage)
        assert [batch.tokens.tolist() for batch in ValidationLoader(remote, micro_batch=2, cache=cache)] == before


def test_a_remote_shard_that_is_bad_or_missing_is_named(remote: Path, tmp_path: Path) -> None:
    shard = remote / "validation" / "shard.00000.mds.zstd"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for what in ("has another xxh64", "is missing"):
        with pytest.raises(Refusal, match=rf"{shard} {what}.*delete its old copy {tmp_path / 'cache'}"):
            list(ValidationLoader(remote, micro_batch=2, cache=tmp_path / "cache"))
        shutil.rmtree(tmp_path / "cache")
        shard.unlink(missing_ok=True)


def test_a_store_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(CloudDownloader, "direct_download", unreachable)
    with pytest.raises(Refusal, match=r"s3://bucket/set/manifest\.json could not be fetched.*no route to host"):
        open_manifest("s3://bucket/set", tmp_path / "cache")
    with pytest.raises(Refusal, match="could not be fetched"):
        open_manifest("nosuch://bucket/set", tmp_path / "cache")
