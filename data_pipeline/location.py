"""Where a prepared set lives: a local folder, or a remote one mirrored file by file into a local cache.

A local folder is only ever read, so it may be read-only and any number of jobs may share it. A remote set (`s3://`, `gs://`, `file://`
..., or any path when a cache is given) is fetched by the download clients of mosaicml-streaming. A fetched file appears under its final
name by one rename, and a lock (released by the kernel if its holder dies) keeps the ranks of a host from fetching the same file twice.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from data_pipeline.errors import Refusal

TIMEOUT = 300.0  # seconds for one file of a remote set


@dataclass(frozen=True)
class Location:
    """`folder` is where files are read; `remote` is None for a local set."""

    folder: Path
    remote: str | None = None

    def __str__(self) -> str:
        return self.remote or str(self.folder)

    @classmethod
    def of(cls, path_or_url: str | Path, cache: str | Path | None = None) -> Location:
        """Local without a cache (a path or file://), remote with one. A remote URL without a cache is refused."""
        text = str(path_or_url)
        scheme = urlparse(text).scheme
        if scheme == "file":
            text, scheme = unquote(urlparse(text).path), ""
        if cache is None and not scheme:
            return cls(Path(text))
        if cache is None:
            raise Refusal(f"{text} is remote and no cache is set. Set data.cache to a local folder with room for the shards in use.")
        remote = text.rstrip("/") if scheme else os.path.abspath(text)
        mirror = hashlib.sha256(remote.encode()).hexdigest()[:16]  # several sets may share one cache
        return cls(Path(cache) / mirror, remote)

    def fetch(self, name: str, *, again: bool = False) -> Path:
        """The local path of file `name`, downloaded first where it is remote and not here yet (or `again`: the copy here is bad).

        FileNotFoundError if the set does not have it; a Refusal if the store cannot be reached.
        """
        path = self.folder / name
        if self.remote is None or (path.exists() and not again):
            return path
        return self._download(name, path, again)

    def _download(self, name: str, path: Path, again: bool) -> Path:
        from filelock import FileLock
        from streaming.base.storage import CloudDownloader

        path.parent.mkdir(parents=True, exist_ok=True)
        before = _identity(path)
        with FileLock(f"{path}.lock"):
            if path.exists() and (not again or _identity(path) != before):
                return path  # another process fetched it while we waited
            arriving = path.with_name(f"{path.name}.{os.getpid()}.part")
            arriving.unlink(missing_ok=True)
            try:
                CloudDownloader.direct_download(f"{self.remote}/{name}", str(arriving), TIMEOUT)
                os.replace(arriving, path)
            except FileNotFoundError:
                raise
            except Exception as error:  # each store's client has exceptions of its own
                raise Refusal(
                    f"{self.remote}/{name} could not be fetched into {self.folder}: {type(error).__name__}: {error}. "
                    "Check the address, the credentials and the free space of data.cache."
                ) from error
            finally:
                arriving.unlink(missing_ok=True)
        return path


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced by another; None where there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
