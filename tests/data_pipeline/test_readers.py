"""Every format, and everything that can be wrong with a document or a file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import readers
from data_pipeline import reading as accounts
from data_pipeline.errors import Refusal
from data_pipeline.readers import reader_of
from data_pipeline.reading import Document, Reading, cut, pieces

TEXTS = ["Every good boy.\n", "déjà vu — 東京 🙂", "  spaces kept  "]
LINES = b"".join(json.dumps({"text": text, "source": "x"}).encode() + b"\n" for text in TEXTS)


def read(path: Path) -> tuple[list[Document], Reading]:
    reading = Reading()
    reader = reader_of(path)
    assert reader is not None
    return list(reader(path, reading)), reading


def plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def gzipped(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data))


def zstandard(path: Path, data: bytes) -> None:
    with arrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)


KINDS = [("", plain), (".gz", gzipped), (".zst", zstandard)]


@pytest.mark.parametrize(("suffix", "write"), KINDS)
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str, write: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    write(path, LINES)
    documents, reading = read(path)
    assert [document.text for document in documents] == TEXTS
    assert all(document.begins and document.origin == str(path) for document in documents)
    assert reading.done == path.stat().st_size
    assert not reading.skipped


@pytest.mark.parametrize(("suffix", "write"), KINDS)
def test_txt_plain_and_compressed(tmp_path: Path, suffix: str, write: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    write(path, b"first\nline\n<|endoftext|>\nsecond <|endoftext|> not alone\n<|endoftext|>\r\nthird")
    documents, reading = read(path)
    assert [document.text for document in documents] == ["first\nline\n", "second <|endoftext|> not alone\n", "third"]
    assert not reading.skipped


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [*TEXTS, None, ""], "id": [1, 2, 3, 4, 5]}), path)
    documents, reading = read(path)
    assert [document.text for document in documents] == TEXTS
    assert reading.skipped == {accounts.NO_TEXT: 1, accounts.EMPTY: 1}
    assert reading.done == path.stat().st_size


def test_a_broken_value_of_parquet_costs_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = arrow.array([b"good", b"\xff\xfe bad", b"fine"], arrow.binary())
    column = arrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(arrow.table({"text": column}), path)
    documents, reading = read(path)
    assert [document.text for document in documents] == ["good", "fine"]
    assert reading.skipped == {accounts.BROKEN_ENCODING: 1}
    assert reading.first[accounts.BROKEN_ENCODING] == f"{path}:row 2"


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"content": ["x"]}), path)
    with pytest.raises(Refusal, match='no column "text", only content'):
        read(path)


def test_bad_lines_of_jsonl_are_counted_by_reason_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"\n\n{"body": "c"}\n["text"]\n{"text": 3}\n'
        b'{"text": " \\n"}\n{"text": "\\ud800"}\n{"text": "z"}'
    )
    documents, reading = read(path)
    assert [document.text for document in documents] == ["a", "z"]
    assert reading.skipped == {accounts.BROKEN_ENCODING: 2, accounts.INVALID_JSON: 1, accounts.NO_TEXT: 3, accounts.EMPTY: 1}
    assert reading.first == {
        accounts.BROKEN_ENCODING: f"{path}:2",
        accounts.INVALID_JSON: f"{path}:3",
        accounts.NO_TEXT: f"{path}:5",
        accounts.EMPTY: f"{path}:8",
    }


def test_a_broken_document_of_a_txt_does_not_take_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n<|endoftext|>\n\xff\xfe\n<|endoftext|>\n \n<|endoftext|>\ntwo \xc3\n<|endoftext|>\nthree\n<|endoftext|>\n")
    documents, reading = read(path)
    assert [document.text for document in documents] == ["one\n", "three\n"]
    assert reading.skipped == {accounts.BROKEN_ENCODING: 2, accounts.EMPTY: 1}
    assert reading.first[accounts.BROKEN_ENCODING] == f"{path}:document 2"


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", accounts.EMPTY), (b"\n \n", accounts.EMPTY), ("text".encode("utf-16"), accounts.BROKEN_ENCODING)]
)
def test_a_txt_without_a_document(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    documents, reading = read(path)
    assert documents == []
    assert reading.skipped == {reason: 1}


def test_a_large_txt_comes_in_pieces_of_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, accounts):
        monkeypatch.setattr(module, "PIECE", 100)
    monkeypatch.setattr(readers, "LINE", 20)
    monkeypatch.setattr(cut, "__defaults__", (100,))
    whole = "".join(f"line {number} with ünïcödé\n" for number in range(100))
    path = tmp_path / "a.txt"
    path.write_bytes(f"{whole}<|endoftext|>\nshort".encode())
    documents, _ = read(path)
    assert len(documents) > 20
    assert [document.begins for document in documents] == [True] + [False] * (len(documents) - 2) + [True]
    assert "".join(document.text for document in documents[:-1]) == whole
    assert max(len(document.text) for document in documents) <= 100


@pytest.mark.parametrize(("name", "write"), [("a.jsonl.gz", gzipped), ("a.jsonl.zst", zstandard), ("a.txt.gz", gzipped)])
def test_an_archive_cut_short_is_refused_by_name(tmp_path: Path, name: str, write: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / name
    write(path, LINES * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Refusal, match=f"{name} cannot be read to its end"):
        read(path)


def test_a_damaged_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(Refusal, match=r"a\.parquet cannot be read as parquet"):
        read(path)


@given(st.text(st.sampled_from("ab \n\t"), max_size=80), st.integers(1, 30))
def test_a_text_is_cut_where_words_cannot_reach_across(text: str, length: int) -> None:
    at = cut(text, length)
    assert at <= len(text)
    assert at >= min(1, len(text))
    if 0 < at < min(len(text), length):
        assert text[at] in " \n"
        assert not text[at - 1].isspace()


def test_short_texts_are_one_piece() -> None:
    assert pieces("abc", "here") == [Document("abc", "here", True)]
