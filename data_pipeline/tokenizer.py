"""Tokenizers: byte-level BPE trained here, or any tokenizer.json.

Byte-level: the alphabet is the 256 bytes, so no text is unknown and decode(encode(text)) == text. The one special token, `<|endoftext|>`,
begins every document; a text that spells it out is encoded as ordinary characters, so that no text can forge a document boundary.

The fingerprint is the SHA-256 of the tokenizer's canonical JSON (sorted keys, no spaces): the same tokenizer has the same one however its
file is laid out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import Refusal
from data_pipeline.manifest import TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN = "<|endoftext|>"
BEGIN_NAMES = (BEGIN, "<|begin_of_text|>", "<s>", "<|bos|>")  # ours and GPT-2's; Llama 3's; Llama 1's and 2's; nanochat's
SMALLEST = 257  # the bytes and the begin token
DEFAULT_VOCABULARY = 32_768


def train_tokenizer(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary_size` entries (fewer where the text has no more pairs to merge)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary_size < SMALLEST:
        raise Refusal(
            f"A vocabulary of {vocabulary_size} is too small for byte-level BPE: 256 bytes and {BEGIN} need at least {SMALLEST} entries."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[BEGIN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_from_json(text: str, where: str) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json, set to return every token of the text and nothing else."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise Refusal(
            f"{where} is not a tokenizer.json that `tokenizers` can read ({error}). Give the tokenizer.json of a fast tokenizer."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens spelt out in a text are text
    return tokenizer


def read_tokenizer_json(path: Path) -> str:
    """The text of a tokenizer.json, or of the one in a folder."""
    file = path / TOKENIZER if path.is_dir() else path
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"The tokenizer {file} cannot be read ({error}). Give the path of a tokenizer.json.") from error


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a prepared folder."""
    return tokenizer_from_json(read_tokenizer_json(Path(path)), str(path))


def fingerprint(text: str) -> str:
    """SHA-256 of the canonical form of a tokenizer.json's text."""
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def begin_id(tokenizer: Tokenizer, where: str) -> int:
    """The id of the token that begins a document."""
    for name in BEGIN_NAMES:
        if (found := tokenizer.token_to_id(name)) is not None:
            return int(found)
    raise Refusal(
        f"{where} has none of the tokens {', '.join(BEGIN_NAMES)}, one of which must begin each document. Add {BEGIN} to its added_tokens."
    )


def id_count(tokenizer: Tokenizer) -> int:
    """One more than the largest id: what a model's embedding must have."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def id_dtype(count: int) -> str:
    """uint16 where every id fits, else uint32."""
    return "uint16" if count <= 1 << 16 else "uint32"
