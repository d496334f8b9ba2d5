"""Prepare: sources to a folder of shards that a training run can read.

    sources -> documents -> split by hash -> token ids (parallel) -> windows -> shards -> manifest

The result depends on the sources, the tokenizer and the options, never on the number of workers. A preparation that is interrupted leaves
nothing under the name `out` (see unfinished.py); the manifest is written last.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from data_pipeline.encoding import ParallelEncoder
from data_pipeline.errors import Refusal
from data_pipeline.manifest import MANIFEST, TOKENIZER, TRAIN, VALIDATION, Manifest
from data_pipeline.reading import Reading
from data_pipeline.sources import Corpus, open_sources
from data_pipeline.tokenizer import (
    DEFAULT_VOCABULARY,
    SMALLEST,
    begin_id,
    fingerprint,
    id_count,
    id_dtype,
    read_tokenizer_json,
    tokenizer_from_json,
    train_tokenizer,
)
from data_pipeline.unfinished import unfinished
from data_pipeline.writing import Progress, Report, SetWriter

SAMPLE_BYTES = 64 << 20  # of text to train a tokenizer on
ORIGINS = 1000  # of which the manifest keeps the counts


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocabulary_size: int | None = None,
    sequence_length: int = 1024,
    validation: float | str = 0.01,
    workers: int = 1,
    progress: Report | None = None,
) -> Manifest:
    """Tokenise, pack and shard `sources` into the new folder `out`.

    tokenizer        a tokenizer.json, or None: byte-level BPE of `vocabulary_size` entries is trained on a sample of the training documents
    sequence_length  inputs of a window; windows hold one id more
    validation       a fraction of the documents, chosen by hash (equal texts go the same way), or a source of their own
    workers          processes that tokenise

    Refuses an `out` that exists, sources that are missing, of no known kind or without a document, and options that contradict each other.
    """
    out, report = Path(out), progress or (lambda _: None)
    fraction, held_out = _validation(validation)
    _check(out, tokenizer, vocabulary_size, sequence_length)
    corpus = open_sources(sources)
    if tokenizer is not None:
        tokenizer_json, where = read_tokenizer_json(Path(tokenizer)), str(tokenizer)
    else:
        tokenizer_json, where = _trained(corpus, fraction, vocabulary_size or DEFAULT_VOCABULARY, report), "the trained tokenizer"
    loaded = tokenizer_from_json(tokenizer_json, where)
    bos_id, count = begin_id(loaded, where), id_count(loaded)
    with unfinished(out) as folder, ParallelEncoder(tokenizer_json, bos_id, id_dtype(count), workers) as encoder:
        writer = SetWriter(folder, sequence_length + 1, id_dtype(count))
        readings = [writer.write(corpus, encoder, lambda text: VALIDATION if in_validation(text, fraction) else TRAIN, report, "encode")]
        if held_out is not None:
            readings.append(writer.write(held_out, encoder, lambda _: VALIDATION, report, VALIDATION))
        splits = writer.finish()
        _check_splits(splits, fraction, list(zip([corpus, held_out or corpus], readings, strict=False)))
        manifest = Manifest(
            sequence_length=sequence_length,
            vocabulary_size=count,
            bos_id=bos_id,
            dtype=id_dtype(count),
            tokenizer_fingerprint=fingerprint(tokenizer_json),
            sources=list(sources),
            splits=splits,
            origins=writer.origins(ORIGINS),
            skipped=dict(sum((reading.skipped for reading in readings), Counter())),
            skipped_first={reason: where for reading in reversed(readings) for reason, where in reading.first.items()},
        )
        (folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _validation(value: float | str) -> tuple[float, Corpus | None]:
    """(fraction by hash, or 0; the validation corpus, or None)."""
    try:
        fraction = float(value)
    except ValueError:
        return 0.0, open_sources([str(value)])
    if not 0 <= fraction < 1:
        raise Refusal(
            f"--validation {value} is not a fraction from 0 up to (not including) 1. For a percentage divide by 100; or give a source."
        )
    return fraction, None


def _check(out: Path, tokenizer: str | Path | None, vocabulary_size: int | None, sequence_length: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refusal(f"{out} exists already and is not overwritten. Give --out another folder, or delete this one first.")
    if tokenizer is not None and vocabulary_size is not None:
        raise Refusal(
            f"Both a tokenizer ({tokenizer}) and a vocabulary size ({vocabulary_size}) are given. Leave out the one that does not apply."
        )
    if vocabulary_size is not None and vocabulary_size < SMALLEST:
        raise Refusal(f"A vocabulary of {vocabulary_size} is too small for byte-level BPE. Give --vocab-size at least {SMALLEST}.")
    if sequence_length < 1:
        raise Refusal(f"--sequence-length {sequence_length} is not a length. Give a positive number of tokens.")


def _check_splits(splits: Collection[str], fraction: float, readings: list[tuple[Corpus, Reading]]) -> None:
    """Refuse a corpus that had no document, or a fraction that held none out."""
    for name, (corpus, reading) in zip((TRAIN, VALIDATION), readings, strict=False):
        if name not in splits:
            raise _empty(corpus, reading, fraction)
    if fraction and VALIDATION not in splits:
        raise Refusal(
            f"No document was held out for validation: {fraction:g} of {_names(readings[0][0])} is less than one document. "
            "Give --validation a larger fraction, a source of its own, or 0 for none."
        )


def _names(corpus: Corpus) -> str:
    return ", ".join(source.name for source in corpus.sources[:5]) + (" ..." if len(corpus.sources) > 5 else "")


def _empty(corpus: Corpus, reading: Reading, fraction: float) -> Refusal:
    skipped = "; ".join(f"{count} skipped for {reason} (first: {reading.first[reason]})" for reason, count in reading.skipped.items())
    held_out = f", or a --validation below {fraction:g}, which may have held out all" if fraction else ""
    return Refusal(
        f"There is no document to learn from in {_names(corpus)}{f': {skipped}' if skipped else ''}. "
        f"Give sources that hold UTF-8 text{held_out}."
    )


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: a hash of its text, as a number in [0, 1), is below `fraction`."""
    if not fraction:
        return False
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def _trained(corpus: Corpus, fraction: float, vocabulary_size: int, report: Report) -> str:
    """The JSON of a tokenizer trained on a sample of the training documents."""
    reading, documents = corpus.reading(), 0

    def texts() -> Iterator[str]:
        nonlocal documents
        for text in sample(corpus, reading, fraction, SAMPLE_BYTES):
            documents += 1
            report(Progress("tokenizer", reading.done, reading.total, documents, 0))
            yield text

    trained = train_tokenizer(texts(), vocabulary_size)
    if not documents:
        raise _empty(corpus, reading, fraction)
    return trained.to_str(pretty=True)


def sample(corpus: Corpus, reading: Reading, fraction: float, budget: int) -> Iterator[str]:
    """The first training documents of every source, an equal share of `budget` bytes for each; what one leaves over the later ones may
    use.
    """
    for position, source in enumerate(corpus.sources):
        share = budget // (len(corpus.sources) - position)
        held_out = False
        for document in source.documents(reading):
            held_out = in_validation(document.text, fraction) if document.begins else held_out
            if held_out:
                continue
            size = len(document.text.encode())
            share, budget = share - size, budget - size
            yield document.text
            if share <= 0:
                break
