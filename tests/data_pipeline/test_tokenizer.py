"""Byte-level BPE: nothing is unknown, nothing is lost, no text forges a document boundary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from data_pipeline import open_tokenizer
from data_pipeline.errors import Refusal
from data_pipeline.tokenizer import begin_id, fingerprint, id_count, id_dtype, tokenizer_from_json, train_tokenizer

TEXTS = ["the cat sat on the mat, and the rat sat on the hat\n" * 20, "naïve café déjà vu 東京 🙂" * 10]
TRAINED = train_tokenizer(iter(TEXTS), 300).to_str(pretty=True)
TOKENIZER = tokenizer_from_json(TRAINED, "test")


@given(st.text() | st.sampled_from(["a<|endoftext|>b", "\x00\u2028\r\n\t  x"]))
def test_decoding_undoes_encoding(text: str) -> None:
    encoded = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(encoded.ids, skip_special_tokens=False) == text
    assert begin_id(TOKENIZER, "test") not in encoded.ids


def test_training_is_deterministic_and_has_the_size_asked_for() -> None:
    again = train_tokenizer(iter(TEXTS), 300).to_str(pretty=False)
    assert fingerprint(again) == fingerprint(TRAINED)
    assert id_count(TOKENIZER) == 300
    assert fingerprint(train_tokenizer(iter(TEXTS), 301).to_str()) != fingerprint(TRAINED)


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary() -> None:
    assert id_count(tokenizer_from_json(train_tokenizer(iter(["ab"]), 5000).to_str(), "test")) == 258


def test_the_fingerprint_does_not_depend_on_the_layout_of_the_file() -> None:
    parsed = json.loads(TRAINED)
    shuffled = json.dumps({key: parsed[key] for key in reversed(parsed)}, indent=7)
    assert fingerprint(shuffled) == fingerprint(TRAINED)


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(TRAINED)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert len(open_tokenizer(place).encode("the cat sat on the mat " * 9).ids) > 20


@pytest.mark.parametrize(("count", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_take_the_smallest_type(count: int, dtype: str) -> None:
    assert id_dtype(count) == dtype


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(Refusal, match=r"is not a tokenizer\.json"):
        open_tokenizer(tmp_path / "bad.json")
    with pytest.raises(Refusal, match="cannot be read"):
        open_tokenizer(tmp_path / "missing.json")
    with pytest.raises(Refusal, match="has none of the tokens"):
        begin_id(Tokenizer(models.BPE()), "mine.json")


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(Refusal, match="at least 257"):
        train_tokenizer(iter(TEXTS), 256)
