"""What a user may call a source, and the documents it stands for.

    FILE                     .txt, .jsonl (also .gz, .zst), .parquet
    FOLDER                   those files in it, recursively, in the order of their paths
    hf:NAME[/CONFIG][@SPLIT] a dataset of the Hugging Face hub, or a local folder, streamed through `datasets`; split `train` unless named
    python-docs              the documentation that comes with Python

`open_sources` resolves names first, so that a missing file, an unknown suffix or an empty folder is refused before anything is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import Refusal
from data_pipeline.python_docs import python_docs
from data_pipeline.readers import READERS, Reader, reader_of
from data_pipeline.reading import OTHER_KIND, Document, Reading, pieces

KINDS = f"{', '.join(READERS)}, folders of these, hf:NAME[/CONFIG][@SPLIT] and python-docs"


@dataclass(frozen=True)
class Source:
    """One file or dataset that yields documents."""

    name: str

    def documents(self, reading: Reading) -> Iterator[Document]:
        """Its documents in order; what is left out goes to the account."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """Bytes to read, if they can be known."""
        return None


@dataclass(frozen=True)
class FileSource(Source):
    """A file on disk."""

    path: Path
    reader: Reader

    def documents(self, reading: Reading) -> Iterator[Document]:
        return self.reader(self.path, reading)

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class PythonDocs(Source):
    """The documentation that comes with Python."""

    def documents(self, reading: Reading) -> Iterator[Document]:
        return python_docs(reading)


@dataclass(frozen=True)
class HubDataset(Source):
    """A dataset streamed through `datasets`: rows with a field "text"."""

    dataset: str
    config: str | None
    split: str

    def documents(self, reading: Reading) -> Iterator[Document]:
        for number, row in enumerate(self._stream(), 1):
            where = f"{self.name}:row {number}"
            if (text := reading.accept(row.get("text"), where)) is not None:
                yield from pieces(text, self.name)

    def _stream(self) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are ours to report, once

        try:
            try:
                rows = load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            except FileNotFoundError:  # `owner/name` and `name/config` look alike: owner first
                owner, _, rest = self.dataset.partition("/")
                if self.config or not rest or Path(self.dataset).is_absolute():
                    raise
                rows = load_dataset(owner, rest, split=self.split, streaming=True)
            yield from rows
        except (OSError, ValueError) as error:  # not found, no network, no such split or config
            raise Refusal(
                f"{self.name} cannot be streamed: {type(error).__name__}: {error}. Write it as hf:NAME[/CONFIG][@SPLIT], check the "
                "network, and "
                "log in first if the dataset is gated."
            ) from error


@dataclass
class Corpus:
    """Sources in order, and the files of a folder that are of no known kind."""

    sources: list[Source] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)

    def reading(self) -> Reading:
        """A fresh account for one pass."""
        sizes = [source.size for source in self.sources]
        known = [size for size in sizes if size is not None]
        reading = Reading(total=sum(known) if len(known) == len(sizes) else None)
        for path in self.ignored:
            reading.skip(OTHER_KIND, str(path))
        return reading

    def documents(self, reading: Reading) -> Iterator[Document]:
        """All documents of all sources."""
        for source in self.sources:
            yield from source.documents(reading)


def open_sources(names: Sequence[str]) -> Corpus:
    """Resolve what the user wrote. Refuses what is missing, of no known kind, or an empty folder."""
    if not names:
        raise Refusal(f"No source was named. A source is one of {KINDS}.")
    corpus = Corpus()
    for name in names:
        if name == "python-docs":
            corpus.sources.append(PythonDocs(name))
        elif name.startswith("hf:"):
            corpus.sources.append(_hub_dataset(name))
        else:
            _add_path(corpus, Path(name))
    return corpus


def _add_path(corpus: Corpus, path: Path) -> None:
    if not path.exists():
        raise Refusal(f"The source {path} does not exist. Check the path; a source is one of {KINDS}.")
    if not path.is_dir():
        reader = reader_of(path)
        if reader is None:
            raise Refusal(
                f"The source {path} has a suffix that is not known. A source is one of {KINDS}; convert it to .jsonl with a field text."
            )
        corpus.sources.append(FileSource(str(path), path, reader))
        return
    before = len(corpus.sources)
    for file in sorted(found for found in path.rglob("*") if found.is_file() and not _hidden(found.relative_to(path))):
        reader = reader_of(file)
        if reader is None:
            corpus.ignored.append(file)
        else:
            corpus.sources.append(FileSource(str(file), file, reader))
    if len(corpus.sources) == before:
        raise Refusal(f"The folder {path} has no file that can be read as a source. A source is one of {KINDS}.")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hub_dataset(name: str) -> HubDataset:
    """hf:NAME[/CONFIG][@SPLIT]. One or two parts are a name; three are owner, name, config; a path stays whole."""
    dataset, _, split = name.removeprefix("hf:").partition("@")
    parts = dataset.split("/")
    if not all(parts) and not dataset.startswith("/"):
        raise Refusal(
            f"{name} does not name a dataset. Write hf:NAME[/CONFIG][@SPLIT], for example hf:Salesforce/wikitext/wikitext-2-raw-v1@train."
        )
    config = None
    if len(parts) == 3 and not dataset.startswith(("/", ".")):
        dataset, config = "/".join(parts[:2]), parts[2]
    return HubDataset(name, dataset, config, split or "train")
