"""Which checkpoint of a folder is taken: the one `latest` names or, if it is damaged, the one before, by name and never in silence.

What is read is what is checked: each rank hashes its share of the files, the ranks' answers are joined, and all take the same checkpoint.
Refused, before anything is loaded: a folder that has checkpoints of which none is whole, and one with a pickle that would run code.
Commands that only read the weights check these alone. Importing this file imports no deepspeed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain import checkpoint_files as files
from pretrain.agreement import gather, rank, world_size
from pretrain.canonical import AVERAGE, WEIGHTS
from pretrain.checkpoint_files import BadCheckpoint, CheckpointManifest, FileEntry
from pretrain.errors import Refusal
from pretrain.training_state import STATE

Reads = Callable[[int, FileEntry, CheckpointManifest], bool]
"""Whether this process is to look into a file, which has this number in the manifest."""

logger = logging.getLogger(__name__)


def newest_whole(folder: Path) -> Path:
    """The checkpoint that training would resume from, for commands that only read weights: nothing in the folder is touched, a run may be
    writing there.

    Raises Refusal when there is none, or none that is whole.
    """
    notes: list[str] = []
    manifest = choose(folder, notes, hashed=_weights_alone, unpickled=nothing)
    log(notes)
    if manifest is None:
        raise Refusal(
            f"There is no checkpoint in {folder} yet. Wait until the run has saved one (checkpoint.every steps), or check the path."
        )
    return folder / files.step_name(manifest.step)


def _weights_alone(_: int, entry: FileEntry, __: CheckpointManifest) -> bool:
    return entry.name.startswith((STATE, WEIGHTS, AVERAGE))


def nothing(_: int, __: FileEntry, ___: CheckpointManifest) -> bool:
    """Reads of who looks into no file: names and sizes are checked all the same."""
    return False


def shares(layout: Mapping[str, int]) -> Reads:
    """What this rank of a run of that layout checks: its own files and rank 0's where it reads them back; else all files are dealt out."""

    def reads(number: int, entry: FileEntry, manifest: CheckpointManifest) -> bool:
        if same_layout(manifest, layout):
            return entry.rank in (0, rank())
        return number % world_size() == rank()

    return reads


def same_layout(manifest: CheckpointManifest, layout: Mapping[str, int]) -> bool:
    """Whether all that a manifest says of its writer's layout is so of this one."""
    return bool(manifest.layout) and manifest.layout.items() <= layout.items()


def log(notes: list[str]) -> None:
    """On rank 0."""
    if rank() == 0:
        for note in notes:
            logger.warning(note)


def choose(folder: Path, notes: list[str], *, hashed: Reads, unpickled: Reads) -> CheckpointManifest | None:
    """The manifest of the first whole checkpoint: the one `latest` names, then the others from the newest down. Adds to `notes`.

    hashed: files whose hash this process checks; unpickled: files of which a pickle must hold nothing but data. All ranks ask. None where
    there is no checkpoint. Raises Refusal where none is whole, or one would run code.
    """
    names, pointer = gather((files.checkpoints(folder), files.read_pointer(folder)))[0]
    if not names:
        return None
    order = names
    if pointer not in names:
        fault = "is missing" if pointer is None else f"names {pointer[:80]!r}, which is not there"
        notes.append(f"{folder / files.POINTER} {fault}; the highest-numbered whole checkpoint is used instead.")
    else:
        order = sorted(names, key=lambda name: name != pointer)
        notes += [
            f"{folder / name} is newer than the one `{files.POINTER}` names ({pointer}), which is followed."
            for name in names[: names.index(pointer)]
        ]
    faults: list[str] = []
    for name in order:
        manifest, fault = _whole(folder / name, hashed, unpickled)
        if manifest is not None:
            notes += [f"{text} It is left out; {name} is used instead." for text in faults]
            return manifest
        faults.append(f"Checkpoint {folder / name} is not whole: {fault}.")
    raise Refusal(
        f"{' '.join(faults)} No whole checkpoint is left in {folder}. Put back a copy of one of them. Nothing starts afresh by itself: to "
        f"train anew, move the folder away or take another run.dir, and leave out --resume."
    )


def _whole(path: Path, hashed: Reads, unpickled: Reads) -> tuple[CheckpointManifest | None, str]:
    """The manifest, if every rank finds what it would read whole; otherwise None and the first fault. Refuses files that would run code."""
    manifest, fault, unsafe = None, "", ""
    try:
        manifest = files.verify(path, hashed)
        unsafe = unsafe_files(path, manifest, unpickled)
    except BadCheckpoint as error:
        fault = str(error)
    answers = gather((fault, unsafe))
    fault = next((text for text, _ in answers if text), "")
    unsafe = next((text for _, text in answers if text), "")
    if unsafe and not fault:
        refuse_unsafe(path, unsafe)
    return (None, fault) if fault else (manifest, "")


def refuse_unsafe(path: Path, unsafe: str) -> None:
    """Raises Refusal for a checkpoint of which `unsafe_files` told something."""
    raise Refusal(
        f"Checkpoint {path} is refused: {unsafe}. A training checkpoint holds tensors and plain data; loading this could run code. "
        f"Nothing was loaded. If it did not come from this framework's own run, delete it; to go back to an earlier "
        f"checkpoint, write its name into {path.parent / files.POINTER}."
    )


def unsafe_files(path: Path, manifest: CheckpointManifest, unpickled: Reads = lambda *_: True) -> str:
    """The first pickle of those chosen (all unless said) that holds more than data, and what; empty when there is none."""
    for number, entry in enumerate(manifest.files):
        if entry.name.endswith(".pt") and unpickled(number, entry, manifest):
            from pretrain.checkpoint_engine import unsafe_content  # imports deepspeed

            if content := unsafe_content(path / entry.name):
                return f"{entry.name} holds {content}"
    return ""
