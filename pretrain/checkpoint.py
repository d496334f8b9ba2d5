"""Saving and resuming a run: what goes into a checkpoint, and which one comes back.

`save` writes a whole checkpoint or none (pretrain.checkpoint_files has the order of writes), on all ranks or on none: every part a
rank does alone is tried, and the ranks agree on success before the next. `load_latest` takes the checkpoint `latest` names, or, if that
one is damaged, the one before, by name and never in silence; it refuses when checkpoints exist and none is whole, when the layout
or the recipe differs, and when a file would run code. Same layout and recipe: the continuation is bit-exact.

One folder shared by all machines is assumed, and checked when the manifest is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from pretrain import checkpoint_files as files
from pretrain import durable
from pretrain.agreement import any_rank, gather, rank, world_size
from pretrain.checkpoint_engine import DurableCheckpointEngine, unsafe_content
from pretrain.checkpoint_files import BadCheckpoint, CheckpointManifest
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.tensor_files import write_file
from pretrain.training_state import TrainingState, capture_random_states, changed_keys, restore_random_states

STATE = "state.json"

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """What `load_latest` found. `notes` are the sentences already logged on rank 0 (a fallback, a leftover), kept for the record."""

    state: TrainingState
    step: int
    notes: list[str]


# --- saving


def save(
    engine: Any, folder: Path, step: int, state: TrainingState, *, keep: int, weights: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Path:
    """Writes checkpoint `step` of a DeepSpeed engine into `folder`, moves `latest` to it and keeps the `keep` newest. All ranks call it.

    weights: on rank 0, further safetensors files by name, each tensors by name: whole weights that are read without an engine.
    Returns the checkpoint's folder. Raises RunStopped (code 5) on every rank when any rank could not write; then nothing is left of
    this checkpoint and the one before is untouched. An error that is not the disk's is raised as it is, where it happened.
    """
    attempt = _Attempt(folder, step)
    attempt.part(lambda: files.start_partial(folder, step), only_rank_0=True)
    partial = files.partial_folder(folder, step)
    written = attempt.part(lambda: _write_engine(engine, folder, partial.name) + _write_state(partial, state, weights or {}))
    entries = attempt.part(lambda: [files.describe(path, rank()) for path in written])
    manifest = CheckpointManifest(step, layout_of(engine), _versions(), [entry for part in gather(entries) for entry in part])
    attempt.part(lambda: files.write_manifest(partial, manifest), only_rank_0=True)
    attempt.part(lambda: files.publish(folder, step), only_rank_0=True)
    attempt.part(lambda: files.prune(folder, keep), only_rank_0=True)
    return folder / files.step_name(step)


class _Attempt:
    """Runs the parts of one save. A part that fails on some rank ends the save on all of them."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step

    def part(self, work: Callable[[], Any], *, only_rank_0: bool = False) -> Any:
        """The work's result, once every rank has done its share; else raises on every rank, with the partial folder removed."""
        result, failure = None, None
        if rank() == 0 or not only_rank_0:
            try:
                result = work()
            except Exception as error:  # the other ranks wait for this one's answer; raised in _give_up
                failure = error
        if any_rank(failure is not None):
            self._give_up(failure)
        return result

    def _give_up(self, failure: Exception | None) -> None:
        said = next((text for text in gather(_say(failure)) if text), "")
        if rank() == 0:
            files.abandon_partial(self.folder, self.step)
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        raise RunStopped(self._paragraph(said), BAD_CHECKPOINT_WRITE) from failure

    def _paragraph(self, said: str) -> str:
        valid = files.read_pointer(self.folder)
        stays = f"The checkpoint {valid} is untouched and stays valid" if valid else "There is no earlier checkpoint of this run"
        return (
            f"The checkpoint of step {self.step} could not be written to {self.folder}: {said}. {stays}; what was written of the "
            f"new one has been removed. Make room there (or lower checkpoint.keep), then go on with --resume."
        )


def _say(failure: Exception | None) -> str:
    if failure is None:
        return ""
    return f"{getattr(failure, 'strerror', None) or failure} (rank {rank()})"


def _write_engine(engine: Any, folder: Path, tag: str) -> list[Path]:
    """This rank's files of weights and optimizer. A failure inside DeepSpeed's collectives is raised after them."""
    writer = _durable_engine(engine)
    writer.start()
    with _without_recovery_script(engine):
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    if writer.failure is not None:
        raise writer.failure
    return writer.written


def _write_state(partial: Path, state: TrainingState, weights: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """This rank's files of everything else."""
    texts = {_random_file(): capture_random_states()}
    if rank() == 0:
        texts[STATE] = state.to_json()
        for name, tensors in weights.items():
            write_file(partial / name, tensors)
    for name, text in texts.items():
        durable.write_text(partial / name, text)
    return [partial / name for name in (*texts, *(weights if rank() == 0 else ()))]


def _durable_engine(engine: Any) -> DurableCheckpointEngine:
    """Our checkpoint engine inside the DeepSpeed engine, put there at the first call."""
    if not isinstance(engine.checkpoint_engine, DurableCheckpointEngine):
        engine.checkpoint_engine = DurableCheckpointEngine()
    return engine.checkpoint_engine


@contextlib.contextmanager
def _without_recovery_script(engine: Any) -> Iterator[None]:
    """Keeps DeepSpeed from copying two scripts beside the checkpoints: not durable, not listed, and a full disk raises on rank 0 alone."""
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        del engine._copy_recovery_script


def _random_file() -> str:
    return f"random_rank_{rank():05d}.json"


def layout_of(engine: Any) -> dict[str, int]:
    """What must be the same for a checkpoint to come back as it was."""
    return {"world_size": world_size(), "zero": int(engine.zero_optimization_stage())}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


# --- resuming


def load_latest(engine: Any, folder: Path, *, config: Mapping[str, Any]) -> Resumed | None:
    """Loads the newest whole checkpoint into the engine and restores the random generators. All ranks call it; `config` is the recipe.

    Returns None when the folder has no checkpoint, and says so. Raises Refusal, the same on every rank and before anything is loaded, when
    checkpoints exist but none is whole, or when the chosen one has another layout, another recipe or a pickle that would run code.
    """
    notes: list[str] = []
    if rank() == 0:
        notes += _leftover_notes(folder)
    manifest = _choose(folder, notes)
    if manifest is None:
        notes.append(f"{folder} holds no checkpoint yet: the run begins at its first step.")
    _log(notes)
    if manifest is None:
        return None
    chosen = folder / files.step_name(manifest.step)
    _refuse_other_layout(chosen, manifest, layout_of(engine))
    state = TrainingState.from_json((chosen / STATE).read_text())
    _refuse_other_config(chosen, state, config)
    _load_engine(engine, chosen)
    restore_random_states((chosen / _random_file()).read_text())
    return Resumed(state, manifest.step, notes)


def newest_whole(folder: Path) -> Path:
    """The checkpoint `load_latest` would take, for commands that only read: nothing in the folder is touched, a run may be writing there.

    Raises Refusal when there is none, or none that is whole.
    """
    notes: list[str] = []
    manifest = _choose(folder, notes)
    _log(notes)
    if manifest is None:
        raise Refusal(
            f"There is no checkpoint in {folder} yet. Wait until the run has saved one (checkpoint.every steps), or check the path."
        )
    return folder / files.step_name(manifest.step)


def _log(notes: list[str]) -> None:
    if rank() == 0:
        for note in notes:
            logger.warning(note)


def _leftover_notes(folder: Path) -> list[str]:
    notes = [
        f"{folder / name} had been set aside by an interrupted save of the same step; it has its name back."
        for name in files.restore_replaced(folder)
    ]
    notes += [
        f"{path} was left by an interrupted save; it is not a checkpoint, is ignored, and the next save removes it."
        for path in files.leftovers(folder)
    ]
    return notes


def _choose(folder: Path, notes: list[str]) -> CheckpointManifest | None:
    """The manifest of the first whole checkpoint: the one `latest` names, then the others from the newest down. Adds to `notes`."""
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
        manifest, fault = _whole(folder / name)
        if manifest is not None:
            notes += [f"{text} It is left out; {name} is used instead." for text in faults]
            return manifest
        faults.append(f"Checkpoint {folder / name} is not whole: {fault}.")
    raise Refusal(
        f"{' '.join(faults)} No whole checkpoint is left in {folder}, and starting afresh would lose the run in silence. Put back a copy "
        f"of one of them, or move the folder away (or take another run.dir) and start without --resume."
    )


def _whole(path: Path) -> tuple[CheckpointManifest | None, str]:
    """The manifest, if every rank finds what it would read whole; otherwise None and the first fault. Refuses files that would run code."""
    manifest, fault, unsafe = None, "", ""
    try:
        manifest = files.verify(path, rank())
        unsafe = _unsafe_files(path, manifest)
    except BadCheckpoint as error:
        fault = str(error)
    answers = gather((fault, unsafe))
    fault = next((text for text, _ in answers if text), "")
    unsafe = next((text for _, text in answers if text), "")
    if unsafe and not fault:
        raise Refusal(
            f"Checkpoint {path} is refused: {unsafe}. A training checkpoint holds tensors and plain data; loading this could run code. "
            f"Nothing was loaded. If it did not come from this framework's own run, delete it; to go back to an earlier "
            f"checkpoint, write its name into {path.parent / files.POINTER}."
        )
    return (None, fault) if fault else (manifest, "")


def _unsafe_files(path: Path, manifest: CheckpointManifest) -> str:
    """The first pickle this rank would read that holds more than data, and what; empty when there is none."""
    for entry in manifest.files:
        if entry.name.endswith(".pt") and entry.rank in (0, rank()) and (content := unsafe_content(path / entry.name)):
            return f"{entry.name} holds {content}"
    return ""


def _refuse_other_layout(path: Path, manifest: CheckpointManifest, layout: Mapping[str, int]) -> None:
    if manifest.layout != layout:
        stored, present = (f"{part['world_size']} rank(s) with ZeRO stage {part['zero']}" for part in (manifest.layout, layout))
        raise Refusal(
            f"Checkpoint {path} was written by {stored}; this run has {present}. Its optimizer state is cut for that layout, and moving a "
            f"checkpoint to another layout is not available yet: resume with the same number of ranks and the same layout.zero."
        )


def _refuse_other_config(path: Path, state: TrainingState, config: Mapping[str, Any]) -> None:
    if changes := changed_keys(state.config, config):
        raise Refusal(
            f"Checkpoint {path} belongs to a run with another recipe: {'; '.join(changes)}. Resume with the recipe as it was (the run's "
            f"config.yaml holds it), or give the changed recipe a run.dir of its own."
        )


def _load_engine(engine: Any, path: Path) -> None:
    _durable_engine(engine)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's BF16 optimizer prints a line for its developers
        found, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if found is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {path}, which was verified a moment ago")
