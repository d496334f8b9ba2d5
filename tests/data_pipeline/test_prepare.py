"""Prepare: every token of every document once, the same result from any number of workers, and nothing that only looks finished."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import Progress, open_manifest, open_tokenizer, prepare, stats, verify
from data_pipeline.errors import Refusal
from data_pipeline.prepare import in_validation, sample
from data_pipeline.reading import BROKEN_ENCODING
from data_pipeline.sources import open_sources
from data_pipeline.store import Store

DOCUMENTS = [f"Document {number} says: {'the quick brown fox ' * (number % 7 + 1)}and ends, naïvely.\n" for number in range(200)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.shards.SHARD_BYTES", 2000)
        prepare([str(source)], out, vocabulary_size=300, sequence_length=32, validation=0.1, workers=1)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ids_of(folder: Path, split: str) -> list[int]:
    store = Store(folder, split)
    return np.concatenate([store[index] for index in range(store.samples)]).tolist()


def test_every_token_of_every_document_is_stored_once(prepared: Path) -> None:
    tokenizer, manifest = open_tokenizer(prepared), open_manifest(prepared)
    expected: dict[str, list[int]] = {"train": [], "validation": []}
    for text in DOCUMENTS:
        expected["validation" if in_validation(text, 0.1) else "train"] += [manifest.bos_id, *tokenizer.encode(text).ids]
    for name, ids in expected.items():
        assert ids_of(prepared, name) == ids
        split = manifest.splits[name]
        assert split.tokens == len(ids)
        assert split.windows == -(-len(ids) // 33)
        assert split.documents == ids.count(manifest.bos_id)
        assert split.largest_id == max(ids)
        assert split.largest_id_sample == ids.index(max(ids)) // 33
    assert sum(split.documents for split in manifest.splits.values()) == len(DOCUMENTS)
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert manifest.dtype == "uint16"
    assert manifest.vocabulary_size == 300


def test_workers_change_nothing(prepared: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shards.SHARD_BYTES", 2000)
    monkeypatch.setattr("data_pipeline.encoding.CHUNK", 500)
    prepare([str(source)], tmp_path / "set", vocabulary_size=300, sequence_length=32, validation=0.1, workers=2)
    assert files(tmp_path / "set") == files(prepared)


def test_a_tokenizer_can_be_given(prepared: Path, source: Path, tmp_path: Path) -> None:
    manifest = prepare([str(source)], tmp_path / "set", tokenizer=prepared / "tokenizer.json", sequence_length=50, validation=0)
    assert manifest.tokenizer_fingerprint == open_manifest(prepared).tokenizer_fingerprint
    assert list(manifest.splits) == ["train"]
    assert manifest == open_manifest(tmp_path / "set")


def test_validation_can_be_a_source_of_its_own(prepared: Path, source: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held out.txt"
    held_out.write_text("Only this.\n<|endoftext|>\nAnd that.")
    manifest = prepare([str(source)], tmp_path / "set", tokenizer=prepared, sequence_length=32, validation=str(held_out))
    assert manifest.splits["train"].documents == len(DOCUMENTS)
    assert manifest.splits["validation"].documents == 2
    assert manifest.origins[str(held_out)].documents == 2


def test_skipped_documents_are_counted_in_the_manifest(prepared: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    manifest = prepare([str(path)], tmp_path / "set", tokenizer=prepared, sequence_length=4, validation=0)
    assert manifest.skipped == {BROKEN_ENCODING: 1}
    assert manifest.skipped_first == {BROKEN_ENCODING: f"{path}:2"}
    assert manifest.splits["train"].documents == 2


def test_pieces_of_a_long_document_stay_together(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.readers.PIECE", 64)
    monkeypatch.setattr("data_pipeline.readers.cut", lambda text: 50)
    texts = [f"{number} and so on " * 40 + "\n" for number in range(20)]
    (tmp_path / "long.txt").write_text("<|endoftext|>\n".join(texts))
    manifest = prepare([str(tmp_path / "long.txt")], tmp_path / "set", tokenizer=prepared, sequence_length=8, validation=0.5)
    tokenizer, found = open_tokenizer(prepared), []
    for name in ("train", "validation"):
        ids = np.array(ids_of(tmp_path / "set", name))
        documents = [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == manifest.bos_id))[1:]]
        assert manifest.splits[name].documents == len(documents) > 2
        found += documents
    assert sorted(found) == sorted(texts)


def test_progress_is_reported_to_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare([str(source)], tmp_path / "set", vocabulary_size=300, sequence_length=32, validation=0, progress=seen.append)
    assert [stage for stage in dict.fromkeys(report.stage for report in seen)] == ["tokenizer", "encode"]
    assert seen[-1] == Progress("encode", source.stat().st_size, source.stat().st_size, len(DOCUMENTS), manifest.splits["train"].tokens)


def test_equal_texts_go_to_the_same_split_in_the_fraction_asked_for() -> None:
    held = [in_validation(f"text {number}", 0.2) for number in range(5000)]
    assert abs(sum(held) / 5000 - 0.2) < 0.02
    assert held == [in_validation(f"text {number}", 0.2) for number in range(5000)]
    smaller = [in_validation(f"text {number}", 0.1) for number in range(5000)]
    assert all(big for big, small in zip(held, smaller, strict=True) if small)


def test_the_sample_for_the_tokenizer_is_bounded_and_takes_from_every_source(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(
            "\n<|endoftext|>\n".join(f"{name} {number:03}" for number in range(100 if name != "a" else 2))
        )
    corpus = open_sources([str(tmp_path)])
    texts = list(sample(corpus, corpus.reading(), 0.0, 120))
    assert [sum(text.startswith(name) for text in texts) for name in "abc"] == [2, 9, 10]
    held = list(sample(corpus, corpus.reading(), 0.5, 10**6))
    assert held == [text for text in sample(corpus, corpus.reading(), 0.0, 10**6) if not in_validation(text, 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 1.5}, "not a fraction"),
        ({"validation": "nosuch.txt"}, "does not exist"),
        ({"vocabulary_size": 100}, "too small"),
        ({"sequence_length": 0}, "is not a length"),
        ({"tokenizer": "t.json"}, "Both a tokenizer"),
        ({"tokenizer": "t.json", "vocabulary_size": None}, "cannot be read"),
        ({"validation": 0.9999999}, "or a --validation below"),
        ({"validation": 1e-9}, "No document was held out"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(source: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"vocabulary_size": 300, "sequence_length": 32, "validation": 0} | changes
    with pytest.raises(Refusal, match=message):
        prepare([str(source)], tmp_path / "sets" / "new", **options)
    assert list(tmp_path.rglob("*.mds*")) == []
    assert not (tmp_path / "sets" / "new").exists()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_empty_corpus_is_refused_with_the_reasons(prepared: Path, tmp_path: Path, with_tokenizer: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n{"no": 1}\n')
    with pytest.raises(
        Refusal, match=r"no document to learn from in .*a\.jsonl: 1 skipped for empty document .*1 skipped for no text field"
    ):
        prepare([str(path)], tmp_path / "set", tokenizer=prepared if with_tokenizer else None, sequence_length=4, validation=0)
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_existing_folder_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(Refusal, match="exists already"):
        prepare([str(source)], tmp_path, vocabulary_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_may_be_the_target(source: Path, prepared: Path, tmp_path: Path) -> None:
    prepare([str(source)], tmp_path, tokenizer=prepared, sequence_length=32, validation=0)
    verify(tmp_path)


def test_a_full_disk_is_refused_and_leaves_nothing(source: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.writing.ShardWriter.write", full)
    with pytest.raises(Refusal, match=r"disk of .* is full"):
        prepare([str(source)], tmp_path / "set", tokenizer=prepared, sequence_length=32, validation=0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_is_removed_and_what_a_living_one_writes_is_not(
    source: Path, prepared: Path, tmp_path: Path
) -> None:
    host = os.uname().nodename
    gone, alive, elsewhere = (
        tmp_path / f".set.unfinished-{name}" for name in (f"{host}-999999999", f"{host}-{os.getppid()}", "other-host-1")
    )
    for folder in (gone, alive, elsewhere):
        folder.mkdir()
    prepare([str(source)], tmp_path / "set", tokenizer=prepared, sequence_length=32, validation=0)
    assert not gone.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_an_interrupted_preparation_leaves_nothing(source: Path, prepared: Path, tmp_path: Path) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], tmp_path / "set", tokenizer=prepared, sequence_length=32, validation=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_stats_say_what_is_there(prepared: Path) -> None:
    found = stats(prepared)
    train = found.splits["train"]
    tokenizer = open_tokenizer(prepared)
    lengths = [len(tokenizer.encode(text).ids) + 1 for text in DOCUMENTS if not in_validation(text, 0.1)]
    assert (train.documents, train.tokens) == (len(lengths), sum(lengths))
    assert (train.lengths["0"], train.lengths["0.5"], train.lengths["1"]) == (min(lengths), int(np.median(lengths)), max(lengths))
    assert train.bytes_per_token == pytest.approx(train.bytes / (sum(lengths) - len(lengths)))
    assert train.shards > 1
    assert sum(counts.tokens for counts in found.top.values()) == sum(split.tokens for split in found.splits.values())
    assert json.loads(json.dumps(asdict(found)))["splits"]["train"]["tokens"] == sum(lengths)
