"""Readers of files: .txt, .jsonl (both also .gz and .zst), .parquet. Each streams: memory holds one piece, line or row batch, not the file.

.txt      one document a file, or several with lines between them that hold only <|endoftext|>
.jsonl    one JSON object a line; its "text" is the document
.parquet  the column "text"
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import Refusal
from data_pipeline.reading import BROKEN_ENCODING, EMPTY, INVALID_JSON, PIECE, Document, Reading, cut, pieces

SEPARATOR = b"<|endoftext|>"
ROWS = 256  # of a parquet file at a time
LINE = 1 << 20  # bytes of a line of text at a time

Reader = Callable[[Path, Reading], Iterator[Document]]


@contextmanager
def open_stream(path: Path, reading: Reading | None = None) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file; `reading` is told how far the file itself has been read. A damaged file is a Refusal."""
    try:
        with open(path, "rb", buffering=0) as raw:
            yield io.BufferedReader(_decompressed(path, raw if reading is None else _Counted(raw, reading)), 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(
            f"{path} cannot be read to its end ({type(error).__name__}: {error}). Copy or download it again, or leave it out of the "
            "sources."
        ) from error


def _decompressed(path: Path, raw: io.RawIOBase) -> io.RawIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # has all of RawIOBase that is used
    if path.suffix.lower() == ".zst":
        import pyarrow as arrow

        return arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")  # unlike others, refuses a stream cut short
    return raw


class _Counted(io.RawIOBase):
    """Passes reads on to a file and adds their bytes to the account."""

    def __init__(self, raw: io.RawIOBase, reading: Reading) -> None:
        self._raw, self._reading = raw, reading

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._reading.done += count
        return count


def read_jsonl(path: Path, reading: Reading) -> Iterator[Document]:
    """A document a line; blank lines are nothing."""
    with open_stream(path, reading) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path}:{number}"
            if line.isspace() or (text := reading.decode(line, where)) is None:
                continue
            try:
                record = json.loads(text)
            except ValueError:
                reading.skip(INVALID_JSON, where)
                continue
            found = record.get("text") if isinstance(record, dict) else None
            if (document := reading.accept(found, where)) is not None:
                yield from pieces(document, str(path))


def read_parquet(path: Path, reading: Reading) -> Iterator[Document]:
    """The column "text", read as bytes so that one broken value costs one document and not its batch."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise Refusal(f'{path} has no column "text", only {columns}. Rename the column that holds the documents.')
            rows, seen, row = max(1, file.metadata.num_rows), 0, 0
            for batch in file.iter_batches(batch_size=ROWS, columns=["text"]):
                for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    row += 1
                    where = f"{path}:row {row}"
                    text = reading.decode(value, where) if value is not None else reading.accept(None, where)
                    if text is not None and (document := reading.accept(text, where)) is not None:
                        yield from pieces(document, str(path))
                reading.done += size * row // rows - seen
                seen = size * row // rows
    except (arrow.ArrowException, OSError) as error:
        raise Refusal(f"{path} cannot be read as parquet ({error}). Copy or download it again, or leave it out of the sources.") from error


def read_txt(path: Path, reading: Reading) -> Iterator[Document]:
    """One pass finds each document's end and whether it is sound, a second, one document behind, yields its text piece by piece."""
    with open_stream(path) as ahead, open_stream(path, reading) as stream:
        for number, (length, sound, blank, separator) in enumerate(_extents(ahead), 1):
            where = f"{path}:document {number}"
            if length and sound and not blank:
                yield from _text_pieces(stream, length, str(path))
            else:
                _discard(stream, length)
                if blank and (length or (number == 1 and not separator)):
                    reading.skip(EMPTY, where)
                elif not sound:
                    reading.skip(BROKEN_ENCODING, where)
            _discard(stream, separator)


def _extents(stream: BinaryIO) -> Iterator[tuple[int, bool, bool, int]]:
    """For each document of a text file: its bytes, whether they are UTF-8, whether all are whitespace, and the bytes of the separator
    line after it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    length, sound, blank, at_line_start = 0, True, True, True

    def check(data: bytes, final: bool) -> None:
        nonlocal sound, blank
        try:
            text = decoder.decode(data, final)
            blank = blank and not text.strip()
        except UnicodeDecodeError:
            sound = blank = False
            decoder.reset()

    while line := stream.readline(LINE):
        if at_line_start and line.rstrip(b"\r\n") == SEPARATOR:
            check(b"", True)
            yield length, sound, blank, len(line)
            length, sound, blank = 0, True, True
        else:
            length += len(line)
            if sound:
                check(line, False)
        at_line_start = line.endswith(b"\n")
    check(b"", True)
    yield length, sound, blank, 0


def _text_pieces(stream: BinaryIO, length: int, origin: str) -> Iterator[Document]:
    """The next `length` bytes, known to be UTF-8, as pieces of one document."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, begins = "", True
    while length:
        data = stream.read(min(length, PIECE))
        if not data:
            raise Refusal(f"{origin} became shorter while it was read. Prepare again once nothing writes to it.")
        length -= len(data)
        held += decoder.decode(data, length == 0)
        while len(held) > PIECE:
            at = cut(held)
            yield Document(held[:at], origin, begins)
            held, begins = held[at:], False
    yield Document(held, origin, begins)


def _discard(stream: BinaryIO, length: int) -> None:
    while length > 0:
        length -= len(stream.read(min(length, PIECE))) or length


READERS: dict[str, Reader] = {
    ".txt": read_txt,
    ".txt.gz": read_txt,
    ".txt.zst": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}


def reader_of(path: Path) -> Reader | None:
    """The reader for a file's suffixes, or None."""
    name = path.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
