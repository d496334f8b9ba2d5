"""The bytes of the tokens of a text are the bytes of the text, whatever the characters and wherever a token cuts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data_pipeline.errors import Refusal
from data_pipeline.token_bytes import bytes_of_entries, token_bytes
from data_pipeline.tokenizer import BEGIN, begin_id, id_count, tokenizer_from_json, train_tokenizer
from tests.data_pipeline.sets import random_documents, write_set

TEXTS = ["the cat sat on the mat, and the rat sat on the hat\n" * 20, "naïve café déjà vu 東京タワー 🙂🙃" * 10]
TRAINED = train_tokenizer(iter(TEXTS), 300).to_str()
TOKENIZER = tokenizer_from_json(TRAINED, "test")
WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}
SIZES = bytes_of_entries(TRAINED, "test")


@given(st.text() | st.sampled_from([*TEXTS, f"a{BEGIN}b", "\x00\u2028\r\n\t  x", "e\u0301 \U0010ffff", "👩‍👩‍👧 السلام"]))
def test_the_bytes_of_the_tokens_are_those_of_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert SIZES[ids].sum() == len(text.encode())


def test_some_entries_are_parts_of_characters_and_some_are_many() -> None:
    assert len(SIZES) == id_count(TOKENIZER) == 300
    assert sorted(set(SIZES.tolist()))[:2] == [0, 1]
    assert SIZES.max() > 3
    halves = [number for entry, number in TOKENIZER.get_vocab().items() if TOKENIZER.decode([number]) == "\ufffd"]
    assert halves
    assert all(SIZES[number] < 4 for number in halves)


def test_special_tokens_stand_for_no_text_and_other_added_ones_for_themselves() -> None:
    tokenizer = Tokenizer.from_str(TRAINED)
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    tokenizer.add_tokens(["<tool é>"])
    sizes = bytes_of_entries(tokenizer.to_str(), "test")
    assert sizes[begin_id(tokenizer, "test")] == 0
    assert sizes[tokenizer.token_to_id("<|pad|>")] == 0
    assert sizes[tokenizer.token_to_id("<tool é>")] == 9
    assert (sizes[:300] == SIZES).all()


def test_a_begin_token_that_is_not_marked_special_is_still_no_text() -> None:
    parsed = json.loads(TRAINED)
    parsed["added_tokens"] = []
    assert bytes_of_entries(json.dumps(parsed), "test")[begin_id(TOKENIZER, "test")] == 0


def fallback_tokenizer() -> Tokenizer:
    """As SentencePiece makes them: a mark in place of each space, and single bytes for what has no entry."""
    entries = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "é", "\u2581a", "ab"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a"), ("a", "b")], byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@given(st.text(alphabet=st.sampled_from("ab é東🙂\n")))
def test_byte_fallback(text: str) -> None:
    tokenizer = fallback_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert bytes_of_entries(tokenizer.to_str(), "test")[ids].sum() == len(text.encode())


@pytest.mark.parametrize(("decoder", "named"), [(None, "missing"), ({"type": "Fuse"}, "Fuse"), (WORD_PIECE, "WordPiece")])
def test_a_decoder_that_loses_bytes_is_refused_by_name(decoder: dict[str, Any] | None, named: str) -> None:
    with pytest.raises(Refusal, match=f"its decoder is {named}"):
        bytes_of_entries(json.dumps(json.loads(TRAINED) | {"decoder": decoder}), "mine.json")


def test_of_a_prepared_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", random_documents(20), tokenizer=TRAINED)
    assert token_bytes(folder).dtype == np.int32
    assert (token_bytes(folder) == SIZES).all()
    assert (token_bytes(folder, tmp_path / "cache") == SIZES).all()
    for cache in (None, tmp_path / "other"):
        with pytest.raises(Refusal, match=r"tokenizer\.json"):
            token_bytes(tmp_path / "none", cache)
