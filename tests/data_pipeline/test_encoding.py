"""Any number of workers gives the ids of one, in order; a document in pieces gives the ids of the whole."""

from __future__ import annotations

import os
import random
import signal
import string
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import encoding
from data_pipeline.encoding import ParallelEncoder
from data_pipeline.errors import Refusal
from data_pipeline.reading import Document, cut
from data_pipeline.tokenizer import begin_id, fingerprint, tokenizer_from_json, train_tokenizer

TEXT = "the cat sat on the mat, and the rat sat on the hat; it's 1234 o'clock\n  again\n\n"
TRAINED = train_tokenizer(iter([TEXT * 20]), 320).to_str()
TOKENIZER = tokenizer_from_json(TRAINED, "test")
BOS = begin_id(TOKENIZER, "test")


def documents(count: int) -> list[Document]:
    rng = random.Random(0)
    return [
        Document("".join(rng.choices(string.ascii_lowercase + "  \n", k=rng.randrange(1, 400))), "here", rng.random() < 0.9)
        for _ in range(count)
    ]


def encode(found: list[Document], workers: int) -> tuple[list[Document], np.ndarray, list[int]]:
    with ParallelEncoder(TRAINED, BOS, "uint16", workers) as encoder:
        chunks = list(encoder.encode(found))
    lengths = [length for chunk in chunks for length in np.diff(chunk.ends, prepend=0).tolist()]
    return [document for chunk in chunks for document in chunk.documents], np.concatenate([chunk.ids for chunk in chunks]), lengths


def test_workers_give_the_ids_of_one_process_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 2000)
    given_documents = documents(300)
    same, ids, lengths = encode(given_documents, 1)
    assert same == given_documents
    expected = [[BOS] * document.begins + TOKENIZER.encode(document.text).ids for document in given_documents]
    assert ids.tolist() == [token for document in expected for token in document]
    assert lengths == [len(document) for document in expected]
    others, other_ids, other_lengths = encode(given_documents, 2)
    assert others == given_documents
    assert other_ids.tolist() == ids.tolist()
    assert other_lengths == lengths


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab' s\n\t1.é—\u00a0"), min_size=1, max_size=60), st.integers(1, 20))
def test_a_document_in_pieces_gives_the_ids_of_the_whole(text: str, length: int) -> None:
    at = cut(text, length)
    if at < len(text) and (text[at] not in " \n" or text[at - 1].isspace()):
        return  # there was no whitespace to cut at: same text, perhaps other tokens
    ids = TOKENIZER.encode(text[:at]).ids + TOKENIZER.encode(text[at:]).ids
    assert ids == TOKENIZER.encode(text).ids


def test_a_text_cannot_forge_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ids, _ = encode([Document("a<|endoftext|>b", "here")], 1)
    assert ids.tolist().count(BOS) == 1


def test_a_killed_worker_is_reported_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 2000)
    with ParallelEncoder(TRAINED, BOS, "uint16", 2) as encoder:

        def deadly() -> Iterator[Document]:
            for number, document in enumerate(documents(400)):
                if number == 200:
                    assert encoder._pool is not None
                    os.kill(next(iter(encoder._pool._processes)), signal.SIGKILL)
                yield document

        with pytest.raises(Refusal, match=r"worker was killed.*fewer --workers"):
            list(encoder.encode(deadly()))


def test_the_fingerprint_is_of_the_tokenizer_and_not_of_its_text() -> None:
    assert fingerprint(TRAINED) == fingerprint(
        tokenizer_from_json(TRAINED, "test").to_str(pretty=True).replace('"encode_special_tokens": true,', "")
    )
