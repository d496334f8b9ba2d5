"""`attractor bench checkpoint`: a checkpoint of a recipe's size changes its layout and is exported, beside plain copies of the same bytes.

The checkpoint is synthetic: the files that DeepSpeed's ranks would write of ZeRO 1 and of ZeRO 3, with their pieces and the whole
weights, without an engine, since an engine of that size fits no small machine. Values are of no meaning; sizes and layout are.

    convert       `attractor checkpoint convert` to one rank, checks of every hash included
    export        `attractor export` of what was converted: fp32 weights, the comparison of logits and the reading back included
    copy          what either wrote, copied file by file, each fsynced: what the disk can do
    ratio         seconds over those of the copy

Each is timed in a process of its own, with the files it reads put out of the system's cache first; `peak_bytes` is the height of that
process's resident memory, libraries included.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import SMALLEST, train_tokenizer
from model.language_model import LanguageModel, build
from model.roles import parameter_roles
from pretrain import checkpoint_files as files
from pretrain import durable
from pretrain.canonical import WEIGHTS
from pretrain.config import Recipe
from pretrain.layout import Layout
from pretrain.optimizer import MUON, parameter_groups
from pretrain.pieces import Held, Pieces, Shard, flat_run, joined_shares, layout_record, pieces_file
from pretrain.run_folder import CHECKPOINTS, CONFIG, TOKENIZER
from pretrain.tensor_files import write_tensors
from pretrain.training_state import STATE, TrainingState

Row = dict[str, Any]
DEFAULT_VOCABULARY, DEFAULT_LENGTH = 32768, 2048
STEP = 1000


def bench_checkpoint(recipe: Recipe, ranks: int, folder: Path | None) -> list[Row]:
    """Rows for ZeRO 1 and ZeRO 3 over `ranks` data ranks: of the copy and the conversion; then of the export and its copy. folder: where
    the files go (None: the system's folder for temporary files); about ten times the weights' fp32 bytes are needed there."""
    rows = []
    for zero in (1, 3):
        with tempfile.TemporaryDirectory(dir=folder) as made:
            run, out = Path(made, "run"), Path(made, "converted")
            synthesise(_sized(recipe, zero), run, ranks)
            convert = _timed(_convert, run, out)
            read = _bytes(run / CHECKPOINTS)
            shutil.rmtree(run)
            rows += _beside_copy("convert", f"{ranks} ranks, ZeRO {zero}", convert, read, out / CHECKPOINTS)
            if zero == 3:
                exported = Path(made, "exported")
                export = _timed(_export, out, exported)
                rows += _beside_copy("export", "any", export, _bytes(exported), exported)
    return rows


def _beside_copy(measure: str, layout: str, measured: Row, read: int, written: Path) -> list[Row]:
    """The row of a copy of what was written, and that of what wrote it."""
    copy = _timed(_copy, written, written.with_name("copy"))
    shutil.rmtree(written.with_name("copy"))
    size = _bytes(written)
    about = {"layout": layout, "read_bytes": read, "written_bytes": size}
    return [
        {"measure": "copy", **about, "read_bytes": size, **copy, "ratio": 1.0},
        {"measure": measure, **about, **measured, "ratio": measured["seconds"] / copy["seconds"]},
    ]


def _sized(recipe: Recipe, zero: int) -> Recipe:
    """With what data would tell, and the layout of the checkpoint."""
    model = replace(recipe.model, vocabulary_size=recipe.model.vocabulary_size or DEFAULT_VOCABULARY)
    data = recipe.data.model_copy(update={"sequence_length": recipe.data.sequence_length or DEFAULT_LENGTH, "path": "nowhere"})
    layout = recipe.layout.model_copy(update={"tensor": 1, "pipeline": 1, "zero": zero, "sequence_parallel": False})
    return recipe.model_copy(update={"model": model, "data": data, "layout": layout})


def synthesise(recipe: Recipe, run: Path, ranks: int) -> None:
    """A run folder with a checkpoint as `ranks` data ranks of the recipe's layout.zero (1 or 3) leave it."""
    model = build(recipe.architecture, device="meta")
    zero = recipe.layout.zero
    (run / CHECKPOINTS).mkdir(parents=True)
    durable.write_text(run / CONFIG, recipe.to_yaml())
    durable.write_text(run / TOKENIZER, train_tokenizer(iter(["some text"]), SMALLEST).to_str())
    folder = files.start_partial(run / CHECKPOINTS, STEP)
    entries = []
    for rank in range(ranks):
        pieces, sizes, updates = _pieces(model, recipe, rank, ranks)
        durable.write_text(folder / pieces_file(rank), pieces.to_json())
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        durable.write(path, partial(torch.save, _rank_file(zero, sizes, updates)))
        entries += [files.describe(folder / name, rank) for name in (pieces_file(rank), path.name)]
    tokens = STEP * recipe.train.global_batch * DEFAULT_LENGTH
    durable.write_text(folder / STATE, TrainingState(tokens=tokens, config=recipe.model_dump(mode="json")).to_json())
    shapes = {name: torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta") for name, parameter in model.named_parameters()}
    weights = write_tensors(folder, WEIGHTS, shapes, lambda name: _values(shapes[name].numel()).bfloat16().view(shapes[name].shape))
    entries += [files.describe(path, 0) for path in (folder / STATE, *weights)]
    layout = layout_record(Layout(data=ranks), zero)
    files.write_manifest(folder, files.CheckpointManifest(STEP, layout, {"torch": torch.__version__}, entries))
    files.publish(run / CHECKPOINTS, STEP)


def _pieces(model: LanguageModel, recipe: Recipe, rank: int, ranks: int) -> tuple[Pieces, list[int], list[str]]:
    """What a rank holds; elements and update of each of its masters, one a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masters: list[list[Held]] = []
    sizes, updates = [], []
    for group in parameter_groups(model, parameter_roles(model), recipe.optimizer):
        shards = [Shard(names[id(parameter)], tuple(parameter.shape)) for parameter in group["params"]]
        if recipe.layout.zero == 3:
            masters.append(joined_shares(shards, rank, ranks))
            sizes.append(sum(-(-shard.size // ranks) for shard in shards))
        else:
            ends = list(accumulate((shard.size for shard in shards), initial=0))
            sizes.append(-(-ends[-1] // ranks))
            masters.append(flat_run(shards, ends[:-1], sizes[-1], rank, ranks))
        updates.append(group["update"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Pieces(layout_record(Layout(data=ranks), recipe.layout.zero), shapes, masters), sizes, updates


def _rank_file(zero: int, sizes: list[int], updates: list[str]) -> dict[str, Any]:
    """The state dict that DeepSpeed saves of a rank, as far as it is read."""
    masters = [_values(size) for size in sizes]
    state = {
        index: {"momentum_buffer": _values(size)}
        if update == MUON
        else {"step": torch.tensor(float(STEP)), "exp_avg": _values(size), "exp_avg_sq": _values(size)}
        for index, (size, update) in enumerate(zip(sizes, updates, strict=True))
    }
    if zero == 3:
        return {"optimizer_state_dict": {"fp32_flat_groups": masters, "optimizer_state_dict": {"state": state}}}
    return {"optimizer_state_dict": {"single_partition_of_fp32_groups": masters, "base_optimizer_state": {"state": state}}}


def _values(size: int) -> Tensor:
    """So many numbers, none of them special."""
    block = 0.04 * (torch.rand(min(size, 1 << 20)) - 0.5)
    return block.repeat(-(-size // max(block.numel(), 1)))[:size].clone()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _timed(work: Callable[[Path, Path], None], source: Path, target: Path) -> Row:
    """seconds and peak_bytes of the work in a new process, its source not in the system's cache."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, work, source, target).result()


def _measure(work: Callable[[Path, Path], None], source: Path, target: Path) -> Row:
    import pretrain.convert
    import pretrain.hub.export
    import pretrain.hub.modeling_attractor  # noqa: F401 (imports are no part of what is timed)

    started = time.perf_counter()
    work(source, target)
    return {"seconds": time.perf_counter() - started, "peak_bytes": _peak()}


def _peak() -> int:
    """Of this process's resident memory. getrusage would count that of the parent, before the new process had its own."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _convert(run: Path, out: Path) -> None:
    from pretrain.convert import convert

    convert(run, {}, out)


def _export(run: Path, out: Path) -> None:
    from pretrain.hub.export import export_run

    export_run(run, out)


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            durable.fsync_file(copy)
