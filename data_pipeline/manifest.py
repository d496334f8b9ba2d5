"""What a prepared folder says about itself.

    DIR/manifest.json    this file: written last, so that a folder without it was never finished
        tokenizer.json   the tokenizer; its fingerprint is in the manifest
        train/           index.json and shard.*.mds.zstd; the hash of index.json is in the manifest,
        validation/      and index.json holds size and hashes of every shard: one chain from here to each token

One sample of a split is a window of sequence_length + 1 token ids; windows do not overlap, so `tokens` is the sum of their lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import Refusal
from data_pipeline.location import Location

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Counts:
    """Documents, tokens (each document's begin token included) and UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Split:
    """One split. `largest_id` is the largest token id in it, first met in window `largest_id_sample`."""

    documents: int
    tokens: int
    bytes: int
    windows: int
    largest_id: int
    largest_id_sample: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """`origins` counts by file (the largest ones); `skipped` counts by reason what was left out, `skipped_first` says where each was met
    first.
    """

    sequence_length: int
    vocabulary_size: int
    bos_id: int
    dtype: str
    tokenizer_fingerprint: str
    sources: list[str]
    splits: dict[str, Split]
    origins: dict[str, Counts] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_first: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read manifest.json; `where` names it in the Refusal of anything that is not one of ours."""
        try:
            return cls._from_object(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(
                f"{where} is not a manifest this version can read ({type(error).__name__}: {error}). It is damaged or was written by "
                "another "
                "version: prepare the data again with `attractor data prepare`."
            ) from error

    @classmethod
    def _from_object(cls, found: Mapping[str, Any]) -> Manifest:
        if found["format"] != FORMAT:
            raise ValueError(f"format is {found['format']!r}, not {FORMAT}")
        parts = dict(found)
        parts["splits"] = {name: Split(**split) for name, split in found["splits"].items()}
        parts["origins"] = {name: Counts(**counts) for name, counts in found["origins"].items()}
        return cls(**parts)

    def split(self, name: str, where: str) -> Split:
        """The split called `name`, or a Refusal that lists those there are."""
        if name not in self.splits:
            raise Refusal(
                f"{where} has no split {name!r}, only {', '.join(sorted(self.splits))}. Prepare it again with --validation set to a "
                "fraction above 0 or to a source of its own."
            )
        return self.splits[name]


def open_manifest(path_or_url: str | Path, cache: str | Path | None = None) -> Manifest:
    """The manifest of a prepared set, local or remote (then `cache` is the local folder that mirrors it)."""
    location = Location.of(path_or_url, cache)
    try:
        text = location.fetch(MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refusal(
            f"{location} is not a finished prepared set: it has no {MANIFEST}. Make one with `attractor data prepare SOURCE --out DIR`, "
            "or correct data.path."
        ) from error
    if b'"format": "puzzles-' in text:
        raise Refusal(f"{location} holds puzzles, not text, and this is for language models. Give a set of text, or a recipe of puzzles.")
    return Manifest.from_json(text, f"{location}/{MANIFEST}")
