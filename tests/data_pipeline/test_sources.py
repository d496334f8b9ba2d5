"""What a user may call a source, and what is refused before anything is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import Refusal
from data_pipeline.reading import NO_TEXT, OTHER_KIND, Reading
from data_pipeline.sources import HubDataset, open_sources


def texts(*names: str) -> tuple[list[str], Reading]:
    corpus = open_sources(names)
    reading = corpus.reading()
    return [document.text for document in corpus.documents(reading)], reading


def test_a_folder_is_read_recursively_in_order_and_other_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b/2.txt": "two",
        "b/10.txt": "ten",
        "a.jsonl": '{"text": "first"}',
        "LICENSE": "MIT",
        ".git/x.txt": "hidden",
    }.items():
        (tmp_path / name).write_text(text)
    found, reading = texts(str(tmp_path))
    assert found == ["first", "ten", "two"]
    assert reading.skipped == {OTHER_KIND: 1}
    assert reading.first[OTHER_KIND].endswith("LICENSE")
    assert reading.total == reading.done == len('{"text": "first"}') + 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"missing\.txt does not exist.*A source is|missing\.txt does not exist.*a source is"),
        ("a.docx", r"a\.docx has a suffix that is not known.*\.jsonl"),
        ("empty", r"folder .*empty has no file that can be read"),
        ("hf:", "does not name a dataset"),
        ("hf:owner//x", "does not name a dataset"),
    ],
)
def test_bad_names_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match=message):
        open_sources([name])


def test_no_source_is_refused() -> None:
    with pytest.raises(Refusal, match="No source was named"):
        open_sources([])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:Salesforce/wikitext", ("Salesforce/wikitext", None, "train")),
        ("hf:Salesforce/wikitext/wikitext-2-raw-v1@test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("hf:/data/mine@validation", ("/data/mine", None, "validation")),
        ("hf:./a/b", ("./a/b", None, "train")),
    ],
)
def test_names_of_hub_datasets(name: str, parts: tuple[str, str | None, str]) -> None:
    source = open_sources([name]).sources[0]
    assert isinstance(source, HubDataset)
    assert (source.dataset, source.config, source.split) == parts


def test_a_local_dataset_is_streamed_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "two", None]))
    (folder / "test.jsonl").write_text('{"text": "held out"}\n')
    found, reading = texts(f"hf:{folder}")
    assert found == ["one", "two"]
    assert reading.skipped == {NO_TEXT: 1}
    assert reading.total is None
    assert texts(f"hf:{folder}@test")[0] == ["held out"]
    with pytest.raises(Refusal, match="cannot be streamed"):
        texts(f"hf:{folder}@nosuch")


def test_two_parts_are_tried_as_owner_and_name_then_as_name_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if "/" in name:
            raise FileNotFoundError(name)
        return [{"text": "found"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:wikitext/wikitext-2-raw-v1")[0] == ["found"]
    assert asked == [("wikitext/wikitext-2-raw-v1", None, "train", True), ("wikitext", "wikitext-2-raw-v1", "train", True)]
    with pytest.raises(Refusal, match=r"hf:a/b/c cannot be streamed: FileNotFoundError"):
        texts("hf:a/b/c")
