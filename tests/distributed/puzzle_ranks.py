"""Runs on each rank for the tests of puzzle runs: whole runs of the trainer, one after the other in one process group."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


def runs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of every case, in order.

    overrides    of the recipe `sudoku-demo`
    resume       (false)
    signalled    the step before which this rank is asked to stop
    """
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    with (
        process_group(TrainSection(tokens=1, device="cpu")) as device,
        patch("pretrain.trainer.process_group", lambda settings: contextlib.nullcontext(device)),
    ):
        return [_one(case) for case in cases]


def _one(case: dict[str, Any]) -> dict[str, Any]:
    from pretrain.config import load_any
    from pretrain.errors import Refusal, RunStopped
    from pretrain.trainer import train

    recipe = load_any("sudoku-demo", case["overrides"])
    steps: list[dict[str, Any]] = []
    code, message, said = 0, "", io.StringIO()
    with _watched(case, steps), contextlib.redirect_stdout(said):
        try:
            train(recipe, case.get("resume", False))
        except Refusal as refusal:
            code, message = 2, str(refusal)
        except RunStopped as stopped:
            code, message = stopped.code, str(stopped)
    return {"code": code, "message": message, "said": said.getvalue(), "steps": steps, "there": Path(recipe.run.dir).exists()}


@contextlib.contextmanager
def _watched(case: dict[str, Any], steps: list[dict[str, Any]]) -> Any:
    """Adds to `steps`, of every step, the positions that were read, and the inputs of this rank's rows and which of them halted."""
    from data_pipeline.puzzles import PuzzleStream
    from pretrain.reasoning import regime

    real_step, real_read, read = regime.supervision_step, PuzzleStream.read, []
    real_build = regime.build_reasoner

    def reading(self: PuzzleStream, start: int, count: int) -> Any:
        read.append([start, count])
        return real_read(self, start, count)

    def step(engine: Any, running: Any, number: int, *, stop_requested: bool) -> Any:
        read.clear()
        found = real_step(engine, running, number, stop_requested=stop_requested or number + 1 == case.get("signalled"))
        rows = [row for carry in running.carries for row in carry.inputs.tolist()]
        halted = [row for carry in running.carries for row in carry.halted.tolist()]
        free = all(latent.grad_fn is None and not latent.requires_grad for carry in running.carries for latent in carry.latents)
        steps.append({"read": list(read), "rows": rows, "halted": halted, "free": free, "position": running.position, "loss": found.loss})
        return found

    with (
        patch.object(regime, "build_reasoner", lambda recipe, device: undecided(real_build(recipe, device))),
        patch.object(regime, "supervision_step", step),
        patch.object(PuzzleStream, "read", reading),
    ):
        yield


@torch.no_grad()
def undecided(model: Any) -> Any:
    """The model with a halting head that stops some rows early: as published nothing would halt before the limit in a short run, all rows
    would halt together, and exploration would change nothing."""
    weight = model.halting.weight
    weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model.halting.bias.zero_()
    return model


def plain(overrides: list[str], steps: int, folder: str) -> list[float]:
    """The same training written out, on one rank: a loop of autograd and the formulas of the updates. Losses; weights go to `folder`."""
    from safetensors.torch import save_file

    from model.reasoning.reasoner import build
    from model.reasoning.supervision import empty_carry, refill, supervise
    from pretrain.config import PuzzleRecipe, load_any
    from pretrain.layout import Layout
    from pretrain.mesh import Mesh
    from pretrain.reasoning.run_data import open_data, resolve
    from pretrain.reasoning.running import Running

    recipe = load_any("sudoku-demo", overrides)
    assert isinstance(recipe, PuzzleRecipe)
    recipe = resolve(recipe)
    stream = open_data(recipe, Mesh(Layout(), 0)).training
    model = undecided(build(recipe.architecture, seed=recipe.train.seed))
    draws = Running(recipe, model, stream, torch.device("cpu"), Mesh(Layout(), 0), recipe.check_world(1))
    rows, rule = recipe.train.global_batch, recipe.optimizer
    table = model.puzzle_embedding.weight  # type: ignore[union-attr]
    others = [parameter for parameter in model.parameters() if parameter is not table]
    adamw = torch.optim.AdamW(others, lr=rule.lr, betas=tuple(rule.betas), eps=rule.eps, weight_decay=rule.weight_decay)
    carry, position, losses = empty_carry(model.start(rows), recipe.cells), 0, []
    for number in range(steps):
        scale = min(1.0, number / recipe.schedule.warmup_steps)
        count = int(carry.halted.sum())
        fresh = stream.read(position, rows)
        carry = refill(carry, fresh.inputs, fresh.answers, fresh.identifiers, model.start(rows))
        position += count
        found = supervise(model, carry, recipe.supervision, torch.cat(draws.least_steps(number)))
        carry = found.carry
        gradients = torch.autograd.grad(found.loss, [*others, table])
        for parameter, gradient in zip(others, gradients, strict=False):
            parameter.grad = gradient
        adamw.param_groups[0]["lr"] = rule.lr * scale
        adamw.step()
        with torch.no_grad():
            lr = rule.puzzle_lr * scale
            table -= lr * rule.puzzle_weight_decay * table * (gradients[-1] != 0) + lr * gradients[-1].sign()
        losses.append(float(found.loss))
    save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, Path(folder) / "plain.safetensors")
    return losses


def alone(cases: list[dict[str, Any]], overrides: list[str], steps: int, folder: str) -> dict[str, Any]:
    """All that needs one rank."""
    return json.loads(json.dumps({"runs": runs(cases), "plain": plain(overrides, steps, folder)}))
