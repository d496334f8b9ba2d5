"""A folder that appears under its name only when it is complete.

Work happens in a hidden sibling, named after the host and process that owns it; one rename makes it appear. After a failure it is
removed; after a kill -9 or a power cut it stays, invisible under the final name, until the next attempt on this host finds its owner
gone.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import Refusal


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block ends well. Refuses a full disk, and an `out` that appeared meanwhile."""
    folder = out.parent / f"{_prefix(out)}{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder.mkdir()
    except OSError as error:
        raise Refusal(
            f"{out.parent} cannot be made or written: {error.strerror}. Give --out a folder elsewhere, or mend its permissions."
        ) from error
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        _appear(folder, out)
        _flush(out.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Refusal(
            f"The disk of {out.parent} is full; nothing was left there. Free some space, or give --out a folder elsewhere."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.unfinished-{socket.gethostname()}-"


def _appear(folder: Path, out: Path) -> None:
    try:
        os.rename(folder, out)  # over nothing, or over an empty folder
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise Refusal(f"{out} appeared while this preparation ran and is not overwritten. Give --out another folder.") from error


def _remove_abandoned(out: Path) -> None:
    """Remove what attempts at `out` on this host left whose processes are gone."""
    prefix = _prefix(out)
    for folder in out.parent.glob(".*.unfinished-*"):
        owner = folder.name.removeprefix(prefix)
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Onto the disk, so that the rename cannot come before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
