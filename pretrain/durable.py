"""Files that survive a crash: whole or not there, on the disk and not only in memory.

A file is durable once it is fsynced and its folder too (the folder holds the name). A name changes by rename, which POSIX makes
atomic: a reader sees the old file or the new one, never a mixture. Nothing here knows what the bytes mean. No torch import.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """Has `writer` fill the file, then fsyncs it. The name itself is durable after `fsync_folder`.

    Raises OSError when the disk refuses. torch.save hides that error behind a RuntimeError about file positions: it is dug out again.
    """
    with path.open("wb") as file:
        try:
            writer(file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """`write` of a text, as UTF-8."""
    write(path, lambda file: file.write(text.encode()))


def fsync_file(path: Path) -> None:
    """Makes what another library wrote there durable."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` (created, renamed, removed) durable."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text` (UTF-8): through `.NAME.partial` beside it and a rename. Raises OSError; then the old file stands."""
    prepare(path, text).rename(path)
    fsync_folder(path.parent)


def prepare(path: Path, text: str) -> Path:
    """The first half of `write_atomically`: everything that needs room on the disk. What is left is to rename what is returned."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_text(partial, text)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return partial


def sha256(path: Path) -> str:
    """Hash of the file's bytes, hexadecimal. It is read in small pieces: between them signals are handled, and other threads run."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
