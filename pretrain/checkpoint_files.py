"""A checkpoint as files on a disk: names, manifest, pointer, what is whole and what goes. Nothing here knows what the files mean.

    checkpoints/
        step-00000100/              a checkpoint; its manifest.json lists every other file with size, sha256 and the rank that wrote it
        step-00000200/
        latest                      the name of the one to resume from (text)
        .step-00000300.partial/     being written, or left by a run that was killed while writing
        .step-00000100.replaced/    set aside for the moment in which a new one takes its name
        .step-00000050.removed/     on its way out

Order of writing: files and their fsync, manifest, fsync of the folder, next pointer (under a temporary name), rename of the folder,
rename of the pointer, and only then removal of old ones. Whatever instant the machine stops at, the pointer names a whole checkpoint.
A manifest carries the sha256 of its own content, so a flipped bit in it is found like any other. No torch import.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import durable

FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-(\d{8,})\.(partial|replaced|removed)")
_READ = (".pt", ".pth", ".bin", ".safetensors", ".json")
"""Of files that are read by their name: one that the manifest does not list is no part of the checkpoint."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: plain name, bytes, hash, and the rank that wrote it and reads it again (rank 0: all read it)."""

    name: str
    bytes: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class CheckpointManifest:
    """What a whole checkpoint says of itself. `layout` and `versions` are the writer's plain JSON; one of no layout has an empty one."""

    step: int
    layout: dict[str, Any]
    versions: dict[str, str]
    files: list[FileEntry]


class BadCheckpoint(Exception):
    """This folder is not a whole checkpoint; the message says which file and why."""


def step_name(step: int) -> str:
    """Folder name of a step; eight digits, so that names sort as numbers."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in a folder name."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name} is not the name of a checkpoint")
    return int(match[1])


def partial_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder / f".{step_name(step)}.partial"


def describe(path: Path, rank: int) -> FileEntry:
    """Size and hash of a file just written, read back from the disk."""
    return FileEntry(path.name, path.stat().st_size, durable.sha256(path), rank)


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints there, newest step first; whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True)


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves and removals left behind."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)) if folder.is_dir() else []


# --- manifest


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest once every listed file is in `folder` with its size; raises OSError if one is not.

    That happens when ranks on several machines do not share the file system the checkpoints are on.
    """
    for entry in manifest.files:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise OSError(f"{entry.name}, which rank {entry.rank} wrote, is not there for rank 0: all machines must share {folder}")
    content = asdict(manifest)
    text = json.dumps({"format": FORMAT, "sha256": _hash_json(content), **content}, indent=1)
    durable.write_text(folder / MANIFEST, text)
    durable.fsync_folder(folder)


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder. Raises BadCheckpoint when missing, cut short, altered or of an unknown format."""
    try:
        stored = json.loads((folder / MANIFEST).read_bytes())
        found, expected = stored.pop("format"), stored.pop("sha256")
        if found != FORMAT:
            raise BadCheckpoint(f"{MANIFEST} has format {found}, this code reads format {FORMAT}")
        if expected != _hash_json(stored):
            raise BadCheckpoint(f"{MANIFEST} does not match its own sha256: it was altered or damaged")
        manifest = CheckpointManifest(**{**stored, "files": [FileEntry(**entry) for entry in stored["files"]]})
        numbers = [manifest.step, *manifest.layout.values(), *(number for entry in manifest.files for number in (entry.bytes, entry.rank))]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a number in it is no natural one")
        if manifest.layout and not {"world_size", "zero"} <= manifest.layout.keys():
            raise ValueError("its layout does not say world_size and zero")
        return manifest
    except OSError as error:
        raise BadCheckpoint(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{MANIFEST} is cut short or damaged ({error})") from error


def verify(
    folder: Path,
    reads: Callable[[int, FileEntry, CheckpointManifest], bool] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> CheckpointManifest:
    """Checks all sizes, and the hashes of the files that `reads` chooses by their number in the manifest (None: of all).

    progress is told the share of the bytes hashed. Raises BadCheckpoint.
    """
    manifest = read_manifest(folder)
    if step_name(manifest.step) != folder.name:
        raise BadCheckpoint(f"its {MANIFEST} is that of step {manifest.step}")
    hashed = [reads is None or reads(number, entry, manifest) for number, entry in enumerate(manifest.files)]
    total, done = max(sum(entry.bytes for entry, read in zip(manifest.files, hashed, strict=True) if read), 1), 0
    for entry, read in sorted(zip(manifest.files, hashed, strict=True), key=lambda pair: pair[1]):  # sizes alone first: they cost nothing
        _check_file(folder, entry, read=read)
        done += entry.bytes if read else 0
        progress(done / total)
    listed = {entry.name for entry in manifest.files}
    for path in folder.iterdir():
        if path.suffix in _READ and path.name not in (MANIFEST, *listed):
            raise BadCheckpoint(f"{path.name} is not listed in its {MANIFEST}: it was put there later")
    return manifest


def _check_file(folder: Path, entry: FileEntry, *, read: bool) -> None:
    if Path(entry.name).name != entry.name or entry.name in ("", ".", ".."):
        raise BadCheckpoint(f"its {MANIFEST} lists {entry.name!r}, which is not a plain file name")
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise BadCheckpoint(f"{entry.name} has {size} bytes instead of {entry.bytes}")
        if read and durable.sha256(path) != entry.sha256:
            raise BadCheckpoint(f"{entry.name} does not match its sha256: it was altered or damaged")
    except OSError as error:
        raise BadCheckpoint(f"{entry.name} cannot be read ({error.strerror})") from error


def _hash_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- pointer and names


def read_pointer(folder: Path) -> str | None:
    """The name `latest` holds; None when there is no such file. It may be nonsense: compare with `checkpoints`."""
    path = folder / POINTER
    return path.read_text(errors="replace").strip() if path.is_file() else None


def publish(folder: Path, step: int) -> Path:
    """Gives a written partial folder its name, then moves the pointer. Raises OSError; until the last rename the pointer stands."""
    target = folder / step_name(step)
    pointer = durable.prepare(folder / POINTER, f"{target.name}\n")
    if target.exists():
        target.rename(folder / f".{target.name}.replaced")
    partial_folder(folder, step).rename(target)
    durable.fsync_folder(folder)
    pointer.rename(folder / POINTER)
    durable.fsync_folder(folder)
    return target


def prune(folder: Path, keep: int) -> None:
    """Keeps the pointed checkpoint and the keep - 1 steps before it; removes older ones, later ones and leftovers.

    Later ones exist when a run went back to an earlier checkpoint: their steps are being trained anew. What cannot be removed is
    logged and tried again at the next save: a run does not end over it.
    """
    current = read_pointer(folder)
    if current is None:
        raise ValueError(f"{folder} has no pointer: nothing may be removed")
    kept = [name for name in checkpoints(folder) if step_of(name) <= step_of(current)][:keep]
    clear_leftovers(folder)
    for name in checkpoints(folder):
        if name not in kept:
            _remove_logged(folder / name, aside=folder / f".{name}.removed")


def start_partial(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into, after clearing away what earlier, interrupted saves left. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    restore_replaced(folder)
    clear_leftovers(folder)
    partial = partial_folder(folder, step)
    partial.mkdir()
    return partial


def abandon_partial(folder: Path, step: int) -> None:
    """Removes what a failed save wrote; an error is logged, and the next save tries again."""
    partial = partial_folder(folder, step)
    if partial.exists():
        _remove_logged(partial, aside=partial)


def clear_leftovers(folder: Path) -> None:
    """Removes what saves and conversions left behind or set aside; what cannot be removed is logged."""
    for path in leftovers(folder):
        _remove_logged(path, aside=path)


def _remove_logged(path: Path, aside: Path) -> None:
    """Removal in two steps, so that a kill halfway leaves no half checkpoint under a checkpoint's name."""
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        logger.warning("could not remove %s (%s); the next save tries again", path, error)


def restore_replaced(folder: Path) -> list[str]:
    """Gives back its name to a checkpoint set aside by a save that was killed before the new one took the name. Returns those names."""
    restored = []
    for path in leftovers(folder):
        name = path.name[1:].removesuffix(".replaced")
        if path.name.endswith(".replaced") and not (folder / name).exists():
            path.rename(folder / name)
            restored.append(name)
    return restored
