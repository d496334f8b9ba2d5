"""Runs on each rank for test_layout_change.py: whole runs of the trainer, and a chain of engines that take over each other's state."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.distributed.training_ranks import batches, recipe_of


def stage(cases: list[dict[str, Any]], chain: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """`cases` are of trainer_ranks.runs; `chain` of overrides, each the layout of an engine. One start of the ranks for both."""

    from pretrain.config import TrainSection
    from pretrain.runtime import process_group
    from tests.pretrain.trainer_ranks import runs

    with (
        process_group(TrainSection(tokens=1, device="cpu")) as device,
        patch("pretrain.runtime.process_group", lambda settings: contextlib.nullcontext(device)),  # a process has one
    ):
        return {"runs": runs(cases), "chain": _chain(chain, Path(folder), device)}


def _chain(layouts: list[dict[str, Any]], folder: Path, device: Any) -> list[dict[str, Any]]:
    """The first engine trains two steps and saves; each later one takes over the last save and saves again, elsewhere.

    Of every save, on rank 0: a hash of each tensor by parameter and slot as the reader gives it, and by how much the module's own
    whole weights differ from the masters.
    """
    import torch.distributed as dist

    from pretrain.agreement import rank, world_size
    from pretrain.checkpoint import load_latest, save
    from pretrain.engine import build_engine, build_model
    from pretrain.layout import layout_on
    from pretrain.mesh import connect
    from pretrain.step import train_step
    from pretrain.training_state import TrainingState
    from pretrain.weights import gather_weights
    from pretrain.zero_pieces import pieces_of

    told = []
    for number, case in enumerate(layouts):
        overrides = {key: value for key, value in case.items() if key != "canonical"}
        recipe = recipe_of({"optimizer.name": "muon", "optimizer.ema": 0.9, **overrides}, world_size())
        mesh = connect(layout_on(recipe.layout, world_size()), device)
        accumulation = recipe.check_world(mesh.layout.data)
        engine = build_engine(recipe, build_model(recipe, device, mesh), accumulation, mesh)
        engine.train()
        config, pieces = recipe.model_dump(mode="json"), pieces_of(engine, mesh)
        if number == 0:
            stream = batches(mesh.where.data, mesh.layout.data, recipe.train.micro_batch)
            for _ in range(2):
                train_step(engine, stream, accumulation, mesh, mask_documents=False, stop_requested=False)
        else:
            config["train"]["precision"] = "fp32"  # a recipe may not change it; its masters are fp32 all the same
            if "canonical" in case and rank() == 0:
                _to_canonical(folder / str(number - 1), case["canonical"])
            dist.barrier()
            found = load_latest(engine, folder / str(number - 1), config=config, pieces=pieces)
            assert found is not None
            assert found.moved
        config["train"]["precision"] = "fp32"
        path = save(engine, folder / str(number), 2, TrainingState(0, config), keep=1, pieces=pieces)
        whole = gather_weights(engine, mesh)
        told.append(_told(path, whole) if rank() == 0 else {})
        engine.destroy()
    return told


def _to_canonical(folder: Path, stems: list[str]) -> None:
    from pretrain.canonical import write_canonical
    from pretrain.checkpoint_files import verify
    from pretrain.convert import sources_of
    from pretrain.stored import open_stored
    from pretrain.training_state import TrainingState

    (path,) = folder.glob("step-*")
    state = TrainingState.from_json((path / "state.json").read_text())
    with open_stored(path, verify(path)) as stored:
        sources = sources_of(stored)
        write_canonical(folder, 2, state, {stem: sources[stem] for stem in stems})


def _told(path: Path, module: dict[str, Any]) -> dict[str, Any]:
    from pretrain.checkpoint_files import read_manifest
    from pretrain.stored import STEP, WEIGHT, open_stored, rows_of

    hashes, off = {}, 0.0
    with open_stored(path, read_manifest(path)) as stored:
        assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in module.items()}
        for name, shape in stored.shapes.items():
            for slot in sorted(stored.slots(name)):
                if slot == STEP:
                    hashes[f"{name}/{slot}"] = str(stored.step(name))
                else:
                    values = stored.rows(name, slot, 0, rows_of(shape))
                    hashes[f"{name}/{slot}"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
            weights = stored.rows(name, WEIGHT, 0, rows_of(shape)).view(shape)
            off = max(off, float((weights.to(module[name].dtype) - module[name]).abs().max()))
    return {"hashes": hashes, "off": off}
