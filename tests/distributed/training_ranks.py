"""Runs on each rank for test_training.py: a few steps of a tiny Attractor Model by the real engine, case by case."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH, GLOBAL_BATCH, STEPS = 64, 16, 4, 5


def recipe_of(case: dict[str, Any], ranks: int) -> Any:
    """A tiny recipe; `case` holds overrides. A pipeline takes its share in two micro-batches where it can."""
    from pretrain.config import load_recipe

    data = ranks // (case.get("layout.tensor", 1) * case.get("layout.pipeline", 1))
    accumulation = 2 if case.get("layout.pipeline", 1) > 1 and data < GLOBAL_BATCH else 1
    settings = {
        "train.tokens": STEPS * GLOBAL_BATCH * LENGTH,
        "train.precision": "fp32",
        "train.micro_batch": GLOBAL_BATCH // (data * accumulation),
        "train.global_batch": GLOBAL_BATCH,
        "data.sequence_length": LENGTH,
        "data.path": "nowhere",
        "model.vocabulary_size": VOCABULARY,
        "model.width": 32,
        "model.heads": 2,
        "model.backbone_layers": 2,
        "model.zero_output_init": False,
        "attractor.gate_initial": 0.3,
        "solver.tolerance": 1e-2,
        "optimizer.clip": 0.5,
        **case,
    }
    return load_recipe("demo", [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()])


def batches(rank: int, ranks: int, micro_batch: int) -> Any:
    """Every step's global batch, the rows of one data rank; sequences are more and less repetitive, so solves differ in length."""
    from data_pipeline import Batch

    generator = torch.Generator().manual_seed(1)
    share = GLOBAL_BATCH // ranks
    for step in range(1000):
        rows = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        rows[0] = step % 7
        rows[1, LENGTH // 2 :] = 3
        rows[3, ::2] = 5
        own = rows[rank * share : (rank + 1) * share]
        for micro in own.split(micro_batch):
            documents = (micro[:, :-1] == 5).cumsum(dim=1).int()
            yield Batch(micro[:, :-1], micro[:, 1:], documents, torch.arange(len(micro)))


def parity(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Losses, norms and iterations by step of every case; rank 0 leaves the whole weights after it in `folder`."""
    from safetensors.torch import save_file

    from pretrain.agreement import rank, world_size
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    results = []
    meshes: dict[Any, Any] = {}  # groups cost threads, which would pile up
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        from pretrain.engine import build_engine, build_model, language_model
        from pretrain.evaluate import evaluate
        from pretrain.invariants import check
        from pretrain.layout import layout_on
        from pretrain.mesh import connect
        from pretrain.optimizer import apply_schedule
        from pretrain.step import train_step
        from pretrain.weights import gather_weights
        from pretrain.zero import client_optimizer

        for index, case in enumerate(cases):
            recipe = recipe_of(case, world_size())
            layout = layout_on(recipe.layout, world_size())
            if layout not in meshes:
                meshes[layout] = connect(layout, device)
            mesh, accumulation = meshes[layout], recipe.check_world(layout.data)
            engine = build_engine(recipe, build_model(recipe, device, mesh), accumulation, mesh)
            engine.train()
            own_iterations: list[float] = []
            refine = language_model(engine).refine
            if refine is not None:
                refine.register_forward_hook(lambda *a, out=own_iterations: out.append(_iterations(a[2])))
            stream, steps = batches(mesh.where.data, layout.data, recipe.train.micro_batch), []
            mask = recipe.data.mask_documents
            for step in range(STEPS):
                apply_schedule(client_optimizer(engine), step, recipe.schedule, STEPS)
                result = train_step(engine, stream, accumulation, mesh, mask_documents=mask, stop_requested=False)
                steps.append([result.loss, result.grad_norm, result.applied])
                check(language_model(engine).named_parameters(), mesh, {"iterations": result.own_iterations})
            engine.eval()
            rows = [next(stream) for _ in range(accumulation)]
            sizes = torch.arange(VOCABULARY, dtype=torch.int32, device=device) % 5
            report = evaluate(engine, rows, [0, 1, "auto", "strict"], device, mesh, mask_documents=mask, text_bytes=sizes)
            weights = gather_weights(engine, mesh)
            if rank() == 0:
                save_file({name: tensor.float() for name, tensor in weights.items()}, Path(folder) / f"{world_size()}-{index}.safetensors")
            told = {"steps": steps, "iterations": own_iterations, "muon": client_optimizer(engine).muon_tensors}
            results.append(told | {"report": report, "tells": mesh.tells, "solver": result.solver})
            engine.destroy()
    return results


def tied_replicas() -> list[float]:
    """Losses of a pipeline of two stages with three replicas; every copy of every tensor must be bit-equal after each step."""
    from data_pipeline import Batch
    from pretrain.agreement import world_size
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    case = {"layout.pipeline": 2, "train.global_batch": 6, "train.micro_batch": 1, "train.tokens": 1000, "model.vocabulary_size": 4096}
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        from pretrain.engine import build_engine, build_model, language_model
        from pretrain.invariants import check
        from pretrain.layout import layout_on
        from pretrain.mesh import connect
        from pretrain.step import train_step

        recipe = recipe_of(case, world_size())
        mesh = connect(layout_on(recipe.layout, world_size()), device)
        engine = build_engine(recipe, build_model(recipe, device, mesh), 2, mesh)
        engine.train()
        generator = torch.Generator().manual_seed(mesh.where.data)
        losses = []
        for _ in range(4):
            rows = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
            stream = (Batch(row[:, :-1], row[:, 1:], torch.zeros_like(row[:, 1:]).int(), torch.arange(1)) for row in rows.split(1))
            result = train_step(engine, stream, 2, mesh, mask_documents=False, stop_requested=False)
            check(language_model(engine).named_parameters(), mesh, {})
            losses.append(result.loss)
    return losses


def leaf_gathers(counts: list[int]) -> list[list[int]]:
    """Under ZeRO 3, by fixed number of solver iterations: how often one step fetches the attractor, and how often anything."""
    from unittest.mock import patch

    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from pretrain.agreement import world_size
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    fetch = PartitionedParameterCoordinator._PartitionedParameterCoordinator__all_gather_params
    found = []
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        from pretrain.engine import build_engine, build_model
        from pretrain.layout import layout_on
        from pretrain.mesh import connect
        from pretrain.step import train_step

        for count in counts:
            case = {"layout.zero": 3, "optimizer.name": "adamw", "solver.min_iterations": count, "solver.max_iterations": count}
            recipe = recipe_of(case, world_size())
            mesh = connect(layout_on(recipe.layout, world_size()), device)
            engine = build_engine(recipe, build_model(recipe, device, mesh), 1, mesh)
            engine.train()
            own = {id(parameter) for parameter in engine.module.refine.parameters()}
            calls: list[bool] = []

            def counting(coordinator: Any, parameters: Any, forward: bool, own: Any = own, calls: Any = calls) -> Any:
                calls.append(any(id(parameter) in own for parameter in parameters))
                return fetch(coordinator, parameters, forward)

            stream = batches(mesh.where.data, mesh.layout.data, recipe.train.micro_batch)
            name = "_PartitionedParameterCoordinator__all_gather_params"
            with patch.object(PartitionedParameterCoordinator, name, counting):
                train_step(engine, stream, 1, mesh, mask_documents=False, stop_requested=False)
            found.append([sum(calls), len(calls)])
            engine.destroy()
    return found


def _iterations(refined: Any) -> float:
    return 0.0 if refined.solution is None else float(refined.solution.iterations.sum())  # 0: the proposal, evaluated


def interrupted_run(run: str, data: str, stops: list[int], resume: bool, extra: list[str]) -> dict[str, Any]:
    """Trains the recipe of `run` in this process, asking itself to stop before the steps in `stops`.

    What each step saw; and, by micro-batch, hashes of what this rank's loader gave, and of the targets its loss was of.
    """
    import os
    import signal

    import pretrain.step
    from model.language_model import LanguageModel
    from pretrain.config import load_recipe
    from pretrain.errors import RunStopped
    from pretrain.trainer import train

    recipe = load_recipe("demo", [f"data.path={data}", f"run.dir={run}", *extra])
    seen: list[list[Any]] = []
    read: list[str] = []
    predicted: list[str] = []
    original, finish = pretrain.step.train_step, LanguageModel.finish

    def watched(engine: Any, stream: Any, accumulation: int, mesh: Any, **options: Any) -> Any:
        ids: list[int] = []

        def noting() -> Any:
            for batch in stream:
                ids.extend(batch.sample_ids.tolist())
                read.append(_hash(batch.targets))
                yield batch

        step = engine.global_steps + 1
        if step in stops:
            os.kill(os.getpid(), signal.SIGUSR1)
            options = {**options, "stop_requested": True}
        result = original(engine, noting(), accumulation, mesh, **options)
        seen.append([step, ids, result.loss, result.grad_norm])
        return result

    def finishing(model: Any, proposal: Any, context: Any, targets: torch.Tensor, depths: Any = None) -> Any:
        if depths is None:
            predicted.append(_hash(targets))
        return finish(model, proposal, context, targets, depths)

    pretrain.step.train_step = watched  # type: ignore[assignment]
    LanguageModel.finish = finishing  # type: ignore[method-assign]
    code = 0
    try:
        train(recipe, resume)
    except RunStopped as stopped:
        code = stopped.code
    finally:
        pretrain.step.train_step = original  # type: ignore[assignment]
        LanguageModel.finish = finish  # type: ignore[method-assign]
    newest = Path(run) / "checkpoints" / (Path(run) / "checkpoints" / "latest").read_text().strip()
    digest = hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()
    return {"code": code, "seen": seen, "weights": digest, "checkpoint": newest.name, "read": read, "predicted": predicted}


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]
