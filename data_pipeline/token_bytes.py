"""How many bytes of text each vocabulary entry stands for, so that losses under different tokenizers can be compared.

    bits per byte = sum of -ln p(token) / (ln 2 * sum of bytes(token))      over predicted tokens with bytes(token) > 0

Special tokens (the begin token of a document among them) stand for no text: 0 bytes. Every other entry has the bytes its decoder gives
back, also where these are a part of a character only:

    ByteLevel (GPT-2, Llama 3, ours)       each character of the entry is one byte of the text
    ByteFallback (SentencePiece, Llama 2)  <0x0A> is one byte; anything else is its own UTF-8, with the mark of a space as a space

The bytes are those of the text that decoding gives: after the tokenizer's normalizer, and with the space that some tokenizers put before
a text. Other decoders are refused: they cannot undo their encoding (WordPiece), or give unknown characters one token of no known length.
Source: nanochat's bits per byte (scripts/tok_train.py, nanochat/loss_eval.py). No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.location import Location
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import begin_id, id_count, read_tokenizer_json, tokenizer_from_json

_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def tokenizer_file(path_or_url: str | Path, cache: str | Path | None = None) -> Path:
    """The tokenizer.json of a prepared set, fetched first where the set is remote. Raises Refusal where there is none."""
    location = Location.of(path_or_url, cache)
    try:
        return location.fetch(TOKENIZER)
    except FileNotFoundError as error:
        raise Refusal(f"{location} has no {TOKENIZER}. Restore the folder as a whole, or prepare the data again.") from error


def token_bytes(path_or_url: str | Path, cache: str | Path | None = None) -> NDArray[np.int32]:
    """Bytes of text of each entry [ids] of a prepared set's vocabulary. Raises Refusal for a tokenizer that does not tell them."""
    file = tokenizer_file(path_or_url, cache)
    return bytes_of_entries(read_tokenizer_json(file), str(file))


def bytes_of_entries(text: str, where: str) -> NDArray[np.int32]:
    """Bytes of text of each entry [ids], from the text of a tokenizer.json; ids that are no entry have 0. Raises Refusal."""
    tokenizer = tokenizer_from_json(text, where)
    count = _counter(json.loads(text).get("decoder"), where)
    sizes = np.zeros(id_count(tokenizer), np.int32)
    for entry, number in tokenizer.get_vocab(with_added_tokens=False).items():
        sizes[number] = count(entry)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        sizes[number] = 0 if added.special else len(added.content.encode())
    sizes[begin_id(tokenizer, where)] = 0
    return sizes


def _counter(decoder: dict[str, Any] | None, where: str) -> Callable[[str], int]:
    """What counts the bytes of an entry, by the decoder's own description in tokenizer.json."""
    parts = (decoder or {}).get("decoders", [decoder] if decoder else [])
    kinds = [part["type"] for part in parts]
    if "ByteLevel" in kinds:
        return _byte_level()
    if "ByteFallback" in kinds:
        replaces = [part for part in parts if part["type"] == "Replace" and "String" in part["pattern"]]
        marks = [(part["pattern"]["String"], part["content"]) for part in replaces]
        marks += [(part["replacement"], " ") for part in parts if part["type"] == "Metaspace"]
        return lambda entry: 1 if _ONE_BYTE.fullmatch(entry) else len(_replaced(entry, marks).encode())
    found = " + ".join(kinds) or "missing"
    raise Refusal(
        f"{where} does not tell how many bytes of text a token stands for: its decoder is {found}, and only "
        "ByteLevel and ByteFallback give back every byte. Prepare the data with a byte-level tokenizer (the default) to have bits per byte."
    )


def _byte_level() -> Callable[[str], int]:
    from tokenizers import pre_tokenizers

    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
    return lambda entry: len(entry) if alphabet.issuperset(entry) else len(entry.encode())  # as the decoder does with a foreign entry


def _replaced(entry: str, marks: list[tuple[str, str]]) -> str:
    for mark, text in marks:
        entry = entry.replace(mark, text)
    return entry
