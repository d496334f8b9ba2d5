"""Runs on each rank for test_training.py: a few steps of a tiny Attractor Model by the real engine, case by case."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH, GLOBAL_BATCH, STEPS = 64, 16, 4, 5


def recipe_of(case: dict[str, Any], micro_batch: int) -> Any:
    """A tiny recipe; `case` holds overrides."""
    from pretrain.config import load_recipe

    settings = {
        "train.tokens": STEPS * GLOBAL_BATCH * LENGTH,
        "train.precision": "fp32",
        "train.micro_batch": micro_batch,
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


def batches(rank: int, ranks: int) -> Any:
    """Every step's global batch, this rank's rows; sequences differ in how repetitive they are, so solves differ in length."""
    from data_pipeline import Batch

    generator = torch.Generator().manual_seed(1)
    share = GLOBAL_BATCH // ranks
    for step in range(1000):
        rows = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        rows[0] = step % 7
        rows[1, LENGTH // 2 :] = 3
        rows[3, ::2] = 5
        own = rows[rank * share : (rank + 1) * share]
        for micro in own.split(share):
            yield Batch(micro[:, :-1], micro[:, 1:], torch.zeros_like(micro[:, 1:], dtype=torch.int32), torch.arange(len(micro)))


def parity(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Losses, norms and iterations by step of every case; rank 0 leaves the whole weights after it in `folder`."""
    from safetensors.torch import save_file

    from pretrain.agreement import rank, world_size
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    results = []
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        from pretrain.engine import build_engine, build_model
        from pretrain.optimizer import apply_schedule
        from pretrain.step import train_step
        from pretrain.weights import gather_weights
        from pretrain.zero import client_optimizer

        for index, case in enumerate(cases):
            recipe = recipe_of(case, GLOBAL_BATCH // world_size())
            engine = build_engine(recipe, build_model(recipe, device), 1)
            engine.train()
            own_iterations: list[float] = []
            refine = engine.module.refine
            if refine is not None:
                refine.register_forward_hook(lambda *a, out=own_iterations: out.append(float(a[2].solution.iterations.sum())))
            stream, steps = batches(rank(), world_size()), []
            for step in range(STEPS):
                apply_schedule(client_optimizer(engine), step, recipe.schedule, STEPS)
                result = train_step(engine, stream, 1, mask_documents=False, stop_requested=False)
                steps.append([result.loss, result.grad_norm, result.applied])
            weights = gather_weights(engine)
            if rank() == 0:
                save_file({name: tensor.float() for name, tensor in weights.items()}, Path(folder) / f"{world_size()}-{index}.safetensors")
            results.append({"steps": steps, "iterations": own_iterations, "muon": client_optimizer(engine).muon_tensors})
            engine.destroy()
    return results


def interrupted_run(run: str, data: str, stops: list[int], resume: bool, extra: list[str]) -> dict[str, Any]:
    """Trains the recipe of `run` in this process, asking itself to stop before the steps in `stops`; what each step saw."""
    import os
    import signal

    import pretrain.step
    from pretrain.config import load_recipe
    from pretrain.errors import RunStopped
    from pretrain.trainer import train

    recipe = load_recipe("demo", [f"data.path={data}", f"run.dir={run}", *extra])
    seen: list[list[Any]] = []
    original = pretrain.step.train_step

    def watched(engine: Any, stream: Any, accumulation: int, **options: Any) -> Any:
        ids: list[int] = []

        def noting() -> Any:
            for batch in stream:
                ids.extend(batch.sample_ids.tolist())
                yield batch

        step = engine.global_steps + 1
        if step in stops:
            os.kill(os.getpid(), signal.SIGUSR1)
            options = {**options, "stop_requested": True}
        result = original(engine, noting(), accumulation, **options)
        seen.append([step, ids, result.loss, result.grad_norm])
        return result

    pretrain.step.train_step = watched  # type: ignore[assignment]
    code = 0
    try:
        train(recipe, resume)
    except RunStopped as stopped:
        code = stopped.code
    finally:
        pretrain.step.train_step = original  # type: ignore[assignment]
    newest = Path(run) / "checkpoints" / (Path(run) / "checkpoints" / "latest").read_text().strip()
    digest = hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()
    return {"code": code, "seen": seen, "weights": digest, "checkpoint": newest.name}
