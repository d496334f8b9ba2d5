"""A run's newest whole checkpoint in canonical form, and its recipe on another layout: one process, no engine, a shard in memory at a time.

    in place    the converted checkpoint takes the step's name once it is whole and on the disk; then the former one, whose tensors it
                has, is removed. Older checkpoints stay as they are. Until the rename nothing has changed.
    --out       a new run folder with the checkpoint, the recipe and the records; the run itself is only read.

The puzzles under way of a run on puzzles are kept as they are. What a converted checkpoint lacks are the states of random generators, which
belong to ranks. Refused before anything is written: a layout that the model or the batch cannot be cut into, a checkpoint that is damaged,
of another model, or with a pickle that would run code, and a target that exists.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from model.language_model import build
from model.reasoning.reasoner import build as build_reasoner
from pretrain import checkpoint_files as files
from pretrain import durable
from pretrain.canonical import AVERAGE, OPTIMIZER, WEIGHTS, Source, write_canonical
from pretrain.checkpoint_choice import choose, log, nothing, refuse_unsafe, unsafe_files
from pretrain.checkpoint_files import BadCheckpoint, CheckpointManifest, FileEntry
from pretrain.config import AnyRecipe, PuzzleRecipe, read_recipe
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.layout import as_dict, layout_on
from pretrain.loaded import any_recipe_of, refuse_other_tensors
from pretrain.pieces import PIECES
from pretrain.reasoning.running import CARRY
from pretrain.run_folder import CHECKPOINTS, CONFIG, RunFolder, guard
from pretrain.runtime import settle_libraries
from pretrain.stored import EMA, STEP, WEIGHT, Stored, open_stored, rows_of
from pretrain.stored_layout import has_pieces, rank_file
from pretrain.tensor_files import TensorFiles, holds
from pretrain.training_state import STATE, TrainingState


def convert(run: Path, wanted: Mapping[str, Any], out: Path | None, progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Converts `run`, or makes `out` of it; what was done, for a report. wanted: tensor, pipeline, data (1 each unless
    given), zero, sequence_parallel, micro_batch (as in the recipe unless given).

    Raises Refusal for bad input, RunStopped (code 5) when the disk refuses.
    """
    started = time.perf_counter()
    settle_libraries(torch.device("cpu"))
    recipe, ranks = recipe_on(any_recipe_of(run), wanted)
    if out is None:
        folder = RunFolder.open(run, resume=True)  # nobody else may write there meanwhile
        try:
            manifest, path = _convert(run / CHECKPOINTS, run / CHECKPOINTS, recipe, progress)
            files.clear_leftovers(run / CHECKPOINTS)
            with _disk(run):
                durable.write_atomically(run / CONFIG, recipe.to_yaml())
        finally:
            folder.close()
    else:
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(out)})})
        manifest, path = _into_new_run(run, out, recipe, progress)
    return {
        "run": str(out or run),
        "step": manifest.step,
        "checkpoint": str(path),
        "bytes": sum(entry.bytes for entry in files.read_manifest(path).files),
        "before": manifest.layout,
        "after": as_dict(layout_on(recipe.layout, ranks), zero=recipe.layout.zero),
        "ranks": ranks,
        "seconds": time.perf_counter() - started,
    }


def recipe_on(recipe: AnyRecipe, wanted: Mapping[str, Any]) -> tuple[AnyRecipe, int]:
    """The recipe on another layout, and its number of ranks. Raises Refusal for one that the model or the batch cannot be cut into."""
    tree = yaml.safe_load(recipe.to_yaml())
    tensor = wanted.get("tensor", 1)
    tree["layout"] |= {
        "tensor": tensor,
        "pipeline": wanted.get("pipeline", 1),
        "zero": wanted.get("zero", recipe.layout.zero),
        "sequence_parallel": wanted.get("sequence_parallel", recipe.layout.sequence_parallel and tensor > 1),
    }
    tree["train"]["micro_batch"] = wanted.get("micro_batch", recipe.train.micro_batch)
    changed = read_recipe(yaml.safe_dump(tree), "--layout")
    data = wanted.get("data", 1)
    changed.check_world(data)
    return changed, data * changed.layout.tensor * changed.layout.pipeline


def _into_new_run(run: Path, out: Path, recipe: AnyRecipe, progress: Callable[[float], None]) -> tuple[CheckpointManifest, Path]:
    """A new run folder, whole or not there."""
    guard(out, resume=False)
    if out.exists():
        raise Refusal(f"{out} exists. Give --out a folder that does not, or remove that one.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _disk(out):
            if partial.exists():
                shutil.rmtree(partial)  # of a conversion that was killed
            partial.mkdir(parents=True)
            manifest, path = _convert(run / CHECKPOINTS, partial / CHECKPOINTS, recipe, progress)
            for file in sorted(run.iterdir()):
                if file.is_file() and not file.name.startswith(".") and file.name != CONFIG:
                    shutil.copyfile(file, partial / file.name)
                    durable.fsync_file(partial / file.name)
            durable.write_text(partial / CONFIG, recipe.to_yaml())
            durable.fsync_folder(partial)
            partial.rename(out)
            durable.fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest, out / path.relative_to(partial)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """An error of the disk ends the command by the words of what could not be written."""
    try:
        yield
    except OSError as error:
        raise RunStopped(
            f"{folder} could not be written ({error}). Make room there or mend its permissions, then give the command again.",
            BAD_CHECKPOINT_WRITE,
        ) from error


def _convert(source: Path, target: Path, recipe: AnyRecipe, progress: Callable[[float], None]) -> tuple[CheckpointManifest, Path]:
    """Writes the newest whole checkpoint of `source` into `target`: its former manifest, and where it is now.

    Its hashes are checked while it is read, and before what was written takes its name. Where they disagree, all checkpoints are hashed
    first, to find the newest whole one.
    """
    with suppress(BadCheckpoint):  # the second attempt finds the damage again, and names it
        return _convert_chosen(source, target, recipe, progress, hashed=False)
    try:
        return _convert_chosen(source, target, recipe, progress, hashed=True)
    except BadCheckpoint as fault:
        raise Refusal(
            f"A checkpoint in {source} changed while it was read: {fault}. If the run is being trained, it removes its older ones: convert "
            f"when it has ended, or raise checkpoint.keep."
        ) from fault


def _convert_chosen(
    source: Path, target: Path, recipe: AnyRecipe, progress: Callable[[float], None], *, hashed: bool
) -> tuple[CheckpointManifest, Path]:
    notes: list[str] = []
    manifest = choose(source, notes, hashed=_is_read if hashed else nothing, unpickled=nothing)
    log(notes)
    if manifest is None:
        raise Refusal(f"There is no checkpoint in {source} to convert. Train first, or check the path.")
    folder = source / files.step_name(manifest.step)
    if manifest.layout and not has_pieces(manifest):
        raise Refusal(
            f"Checkpoint {folder} was written by a version whose checkpoints do not say what each rank held. Resume the run with its own "
            f"layout until it saves again; that checkpoint can be converted."
        )
    try:
        if unsafe := unsafe_files(folder, manifest, _is_read):
            refuse_unsafe(folder, unsafe)
        with ThreadPoolExecutor(1, "verify") as verifying, open_stored(folder, manifest) as stored:
            _refuse_other_model(recipe, stored, folder)
            state = replace(TrainingState.read(folder), config=recipe.model_dump(mode="json"))
            verified = verifying.submit(files.verify, folder, nothing if hashed else _is_read)
            with _under_way(folder) as sources:
                sources |= sources_of(stored)
                return manifest, write_canonical(target, manifest.step, state, sources, progress, verified.result)
    except Exception:
        if not hashed:
            files.verify(folder, _is_read)  # damage is the better explanation of what went wrong
        raise


def _is_read(_: int, entry: FileEntry, manifest: CheckpointManifest) -> bool:
    """All but the copies of the weights that no conversion looks at."""
    if not manifest.layout:
        return True
    return entry.name.startswith((STATE, PIECES, CARRY)) or entry.name.endswith(rank_file(manifest.layout["zero"]))


def _refuse_other_model(recipe: AnyRecipe, stored: Stored, folder: Path) -> None:
    model: torch.nn.Module
    if isinstance(recipe, PuzzleRecipe):
        model = build_reasoner(recipe.architecture, device="meta")
    else:
        model = build(recipe.architecture, device="meta")
    found = {name: torch.empty(shape, device="meta") for name, shape in stored.shapes.items()}
    refuse_other_tensors(dict(model.named_parameters()), found, folder)


@contextmanager
def _under_way(folder: Path) -> Iterator[dict[str, Source]]:
    """The puzzles under way of a checkpoint, by stem; nothing of one that has none."""
    if holds(folder, CARRY):
        with TensorFiles(folder, CARRY) as carried:
            yield {CARRY: Source(carried.shapes, carried.read)}
    else:
        yield {}


def sources_of(stored: Stored) -> dict[str, Source]:
    """What a canonical checkpoint is written from."""
    kept = {name: stored.slots(name) for name in stored.shapes}
    weights = {name: (name, WEIGHT) for name in kept}
    average = {name: (name, EMA) for name in kept if EMA in kept[name]}
    optimizer = {f"{name}/{slot}": (name, slot) for name in kept for slot in kept[name] if slot not in (WEIGHT, EMA)}
    stems = {WEIGHTS: weights, AVERAGE: average, OPTIMIZER: optimizer}
    return {stem: _source(stored, tensors) for stem, tensors in stems.items() if tensors}


def _source(stored: Stored, tensors: dict[str, tuple[str, str]]) -> Source:
    def read(tensor: str) -> torch.Tensor:
        name, slot = tensors[tensor]
        shape = stored.shapes[name]
        return torch.tensor(stored.step(name)) if slot == STEP else stored.rows(name, slot, 0, rows_of(shape)).view(shape)

    shapes = {tensor: torch.empty(() if slot == STEP else stored.shapes[name], device="meta") for tensor, (name, slot) in tensors.items()}
    return Source(shapes, read)
