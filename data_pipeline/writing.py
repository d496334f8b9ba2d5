"""Documents to the splits of a prepared folder: encode, pack, shard, count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.encoding import ParallelEncoder
from data_pipeline.manifest import Counts, Split
from data_pipeline.packing import Packer
from data_pipeline.reading import Document, Reading
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Corpus


class Progress(NamedTuple):
    """How far a preparation is: bytes read of how many (None: unknown), documents and tokens written so far."""

    stage: str
    done: int
    total: int | None
    documents: int
    tokens: int


Report = Callable[[Progress], None]


class SplitWriter:
    """One split under way."""

    def __init__(self, folder: Path, window: int, dtype: str) -> None:
        self._packer = Packer(window, np.dtype(dtype))
        self._shards = ShardWriter(folder, dtype)
        self._counts: Counter[str] = Counter()
        self._largest, self._largest_sample = -1, -1

    def add(self, ids: NDArray, documents: int, size: int) -> None:
        """Append ids [n] in which `documents` begin, encoding `size` bytes of text."""
        self._counts.update(documents=documents, tokens=len(ids), bytes=size)
        self._store(self._packer.push(ids))

    def finish(self) -> Split:
        """Write the last window, which may be shorter, and the index."""
        rest = self._packer.finish()
        if len(rest):
            self._store(rest[None])
        return Split(
            **self._counts,
            windows=self._shards.windows,
            largest_id=self._largest,
            largest_id_sample=self._largest_sample,
            index_sha256=self._shards.finish(),
        )

    def _store(self, windows: NDArray) -> None:
        if windows.size and (largest := int(windows.max())) > self._largest:
            self._largest = largest
            self._largest_sample = self._shards.windows + int(np.argmax(windows)) // windows.shape[1]
        for window in windows:
            self._shards.write(window)


class SetWriter:
    """All splits of a prepared folder under way."""

    def __init__(self, folder: Path, window: int, dtype: str) -> None:
        self._folder, self._window, self._dtype = folder, window, dtype
        self._splits: dict[str, SplitWriter] = {}
        self._origins: dict[str, Counter[str]] = {}

    def write(self, corpus: Corpus, encoder: ParallelEncoder, split_of: Callable[[str], str], report: Report, stage: str) -> Reading:
        """Encode every document of `corpus` into the split that `split_of` gives for its text (its first piece). Returns the account of
        the reading.
        """
        reading = corpus.reading()
        documents = tokens = 0
        split = ""  # of the document under way: its later pieces go where its beginning went
        for encoded in encoder.encode(corpus.documents(reading)):
            start = 0
            for document, end in zip(encoded.documents, encoded.ends.tolist(), strict=True):
                split = split_of(document.text) if document.begins else split
                self._add(split, document, encoded.ids[start:end])
                documents, start = documents + document.begins, end
            tokens += start
            report(Progress(stage, reading.done, reading.total, documents, tokens))
        return reading

    def _add(self, split: str, document: Document, ids: NDArray) -> None:
        size, begun = len(document.text.encode()), int(document.begins)
        if split not in self._splits:
            self._splits[split] = SplitWriter(self._folder / split, self._window, self._dtype)
        self._splits[split].add(ids, begun, size)
        self._origins.setdefault(document.origin, Counter()).update(documents=begun, tokens=len(ids), bytes=size)

    def finish(self) -> dict[str, Split]:
        """Close every split that has a document."""
        return {name: writer.finish() for name, writer in self._splits.items()}

    def origins(self, most: int) -> dict[str, Counts]:
        """Counts of the origins with the most tokens."""
        largest = sorted(self._origins.items(), key=lambda item: -item[1]["tokens"])[:most]
        return {name: Counts(**counts) for name, counts in largest}
