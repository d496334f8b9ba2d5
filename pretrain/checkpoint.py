"""Saving and resuming a run: what goes into a checkpoint, and how one comes back.

`save` writes a whole checkpoint or none (pretrain.checkpoint_files has the order of writes), on all ranks or on none: every part a
rank does alone is tried, and the ranks agree on success before the next. `load_latest` takes the checkpoint that
pretrain.checkpoint_choice chooses, and refuses one of another recipe. On the layout that wrote it DeepSpeed loads its own files, and the
continuation is bit-exact; on any other, and from a canonical checkpoint, every rank takes its elements by name (pretrain.adopt).

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
from pretrain.adopt import adopt
from pretrain.agreement import any_rank, gather, rank, world_size
from pretrain.canonical import OPTIMIZER
from pretrain.checkpoint_choice import choose, log, newest_whole, same_layout, shares
from pretrain.checkpoint_engine import DurableCheckpointEngine
from pretrain.checkpoint_files import CheckpointManifest
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.pieces import Pieces, describe_layout, pieces_file
from pretrain.stored_layout import has_pieces
from pretrain.tensor_files import holds, write_file
from pretrain.training_state import (
    LAYOUT_KEYS,
    MODEL_KEYS,
    STATE,
    TrainingState,
    capture_random_states,
    changed_keys,
    reseed,
    restore_random_states,
)

__all__ = ["Resumed", "layout_of", "load_latest", "newest_whole", "save"]

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """What `load_latest` found. `notes` are the sentences already logged on rank 0 (a fallback, a leftover, another layout)."""

    state: TrainingState
    step: int
    notes: list[str]
    moved: bool
    """Whether the checkpoint was of another layout, or of none."""


# --- saving


def save(
    engine: Any,
    folder: Path,
    step: int,
    state: TrainingState,
    *,
    keep: int,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
    pieces: Pieces | None = None,
) -> Path:
    """Writes checkpoint `step` of a DeepSpeed engine into `folder`, moves `latest` to it and keeps the `keep` newest. All ranks call it.

    weights: on rank 0, further safetensors files by name, each tensors by name: whole weights that are read without an engine.
    pieces: what this rank holds; without it the checkpoint resumes on this layout alone.
    Returns the checkpoint's folder. Raises RunStopped (code 5) on every rank when any rank could not write; then nothing is left of
    this checkpoint and the one before is untouched. An error that is not the disk's is raised as it is, where it happened.
    """
    attempt = _Attempt(folder, step)
    attempt.part(lambda: files.start_partial(folder, step), only_rank_0=True)
    partial = files.partial_folder(folder, step)
    written = attempt.part(lambda: _write_engine(engine, folder, partial.name) + _write_state(partial, state, weights or {}, pieces))
    entries = attempt.part(lambda: [files.describe(path, rank()) for path in written])
    manifest = CheckpointManifest(step, layout_of(engine, pieces), _versions(), [entry for part in gather(entries) for entry in part])
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


def _write_state(partial: Path, state: TrainingState, weights: Mapping[str, Mapping[str, Tensor]], pieces: Pieces | None) -> list[Path]:
    """This rank's files of everything else."""
    texts = {_random_file(): capture_random_states()}
    if pieces is not None:
        texts[pieces_file(rank())] = pieces.to_json()
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


def layout_of(engine: Any, pieces: Pieces | None) -> dict[str, int]:
    """What a manifest says of the layout that wrote it; without pieces, all that an engine tells."""
    if pieces is not None:
        return pieces.layout
    return {"world_size": world_size(), "zero": int(engine.zero_optimization_stage())}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


# --- resuming


def load_latest(engine: Any, folder: Path, *, config: Mapping[str, Any], pieces: Pieces | None = None) -> Resumed | None:
    """Loads the newest whole checkpoint into the engine and sets the random generators. All ranks call it; `config` is the recipe.

    pieces: what this rank holds; without it only a checkpoint of this layout is taken. Returns None when the folder has no checkpoint, and
    says so. Raises Refusal, the same on every rank and before anything is loaded, when checkpoints exist but none is whole, or when the
    chosen one is of another recipe, says too little for another layout, or has a pickle that would run code.
    """
    notes: list[str] = []
    if rank() == 0:
        notes += _leftover_notes(folder)
    layout = layout_of(engine, pieces)
    manifest = choose(folder, notes, hashed=shares(layout), unpickled=shares(layout))
    if manifest is None:
        notes.append(f"{folder} holds no checkpoint yet: the run begins at its first step.")
        log(notes)
        return None
    chosen = folder / files.step_name(manifest.step)
    state = TrainingState.read(chosen)
    moved = _moves(chosen, manifest, state, config, layout, pieces)
    _refuse_other_config(chosen, manifest, state, config)
    if moved:
        assert pieces is not None  # or _moves had refused
        kept = adopt(engine, pieces, chosen, manifest)
        engine.global_steps = manifest.step
        engine.global_samples = manifest.step * engine.train_batch_size()
        reseed(config["train"]["seed"], manifest.step, rank())
        notes.append(_moved_note(chosen, manifest, layout, kept))
    else:
        _load_engine(engine, chosen)
        restore_random_states((chosen / _random_file()).read_text())
    log(notes)
    return Resumed(state, manifest.step, notes, moved)


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


def _moves(
    path: Path, manifest: CheckpointManifest, state: TrainingState, config: Mapping[str, Any], layout: dict[str, int], pieces: Pieces | None
) -> bool:
    """Whether the checkpoint is of another layout, or of none. Raises Refusal where it is and what ranks hold is not known."""
    same = same_layout(manifest, layout)
    if pieces is not None and (not manifest.layout or has_pieces(manifest)):
        return not same or any_rank((path / pieces_file(rank())).read_text(encoding="utf-8") != pieces.to_json())
    if not same or changed_keys(state.config, config, only=LAYOUT_KEYS):
        raise Refusal(
            f"Checkpoint {path} was written by {describe_layout(manifest.layout)}, by a version whose checkpoints do not say what each "
            f"rank held; this run has {describe_layout(layout)}. Resume it with the layout section, train.micro_batch and train.recompute "
            f"that it was saved with (the run's config.yaml has them); what is saved from then on can change its layout."
        )
    return False


def _moved_note(path: Path, manifest: CheckpointManifest, layout: Mapping[str, int], optimizer: bool) -> str:
    came = "Weights, optimizer state, schedule, data order and ledger go on" if optimizer else "Weights came; the optimizer starts afresh"
    return (
        f"{path} is of {describe_layout(manifest.layout)}; this run has {describe_layout(layout)}. {came}. Random generators belong to "
        f"ranks and start anew from (train.seed, step, rank); sums are added in another order, so losses agree to rounding, not to the bit."
    )


def _refuse_other_config(path: Path, manifest: CheckpointManifest, state: TrainingState, config: Mapping[str, Any]) -> None:
    weights_alone = not manifest.layout and not holds(path, OPTIMIZER)  # nothing but the model is settled yet
    if changes := changed_keys(state.config, config, only=MODEL_KEYS if weights_alone else None):
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
