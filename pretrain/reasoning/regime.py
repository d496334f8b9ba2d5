"""Puzzles as a regime (pretrain/regime.py): rows under way, the engine of a PuzzleRecipe, the supervision step, evaluation.

A step's tokens are global_batch * cells. Exactness, cell accuracy, the halting head and the steps taken are told of puzzles that have
finished since the last record: in the first steps of a run none has, and its rows then finish together.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.cost import Parameters, Work
from model.reasoning.cost import count_reasoner, reasoner_flops
from model.reasoning.reasoner import Reasoner, build
from model.reasoning.roles import parameter_roles
from pretrain.checkpoint import Resumed
from pretrain.engine import start_engine
from pretrain.ledger import Ledger
from pretrain.mesh import Mesh
from pretrain.optimizer import build_puzzle_optimizer
from pretrain.probe import refuse_unlike
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.reasoning.evaluate import evaluate
from pretrain.reasoning.probe import probe_loss
from pretrain.reasoning.run_data import PuzzleData
from pretrain.reasoning.running import CARRY, Running
from pretrain.reasoning.step import FINISHED, supervision_step
from pretrain.regime import Beat, Stepped


class Puzzles:
    """A run of a resolved PuzzleRecipe on this rank."""

    rate_keys = "optimizer.lr"

    def __init__(self, recipe: PuzzleRecipe, device: torch.device, mesh: Mesh, accumulation: int, data: PuzzleData) -> None:
        self.recipe, self.device, self.mesh = recipe, device, mesh
        self.step_tokens, self.total_steps = recipe.train.global_batch * recipe.cells, recipe.train.steps
        self.schedule = recipe.learning_rate_schedule
        self.validation = data.validation
        model = build_reasoner(recipe, device)
        optimizer = build_puzzle_optimizer(model, parameter_roles(model), recipe.optimizer, fused=device.type == "cuda")
        self.engine = start_engine(recipe, model, optimizer, accumulation, mesh)
        self.model: Reasoner = self.engine.module  # in the precision it is trained in
        self.engine.train()
        self.running = Running(recipe, self.model, data.training, device, mesh, accumulation)
        self.ledger = Ledger(partial(reasoner_flops, recipe.architecture), recipe.cells)
        self.finished = dict.fromkeys(FINISHED, 0.0)  # since the last record

    def step(self, *, number: int, stop_requested: bool, beat: Beat) -> Stepped:
        found = supervision_step(self.engine, self.running, number, stop_requested=stop_requested)
        beat(f"step {number}")
        self.finished = {name: value + found.finished[name] for name, value in self.finished.items()}
        measured = {**self._told(found.means), **shares(self.finished)}
        if (number + 1) % self.recipe.train.log_every == 0 or not found.applied:  # the loop has told it
            self.finished = dict.fromkeys(FINISHED, 0.0)
        work = Work(found.means["solver_evaluations"], found.means["applications"], found.means["products"])
        return Stepped(found.loss, found.grad_norm, found.applied, found.stop, found.own_iterations, work, measured)

    def _told(self, means: dict[str, float]) -> dict[str, float]:
        """For the record: what a solver did only where there is one."""
        if self.recipe.model.solves:
            return means
        return {name: value for name, value in means.items() if not name.startswith("solver_") or name == "solver_evaluations"}

    def evaluate(self, beat: Beat) -> dict[str, Any]:
        chosen = self.recipe.evaluation
        batch, limit = chosen.batch or self.recipe.train.micro_batch, chosen.puzzles

        def progress(share: float) -> None:
            beat(f"evaluation, {share:.0%}")

        return evaluate(self.engine, self.validation, chosen.steps, self.device, self.mesh, batch=batch, limit=limit, progress=progress)

    def in_words(self, report: dict[str, Any]) -> str:
        exact = "  ".join(f"{steps}: {share:.1%}" for steps, share in report["exact"].items())
        last = list(report["loss"])[-1]
        return f"exact after steps {exact}  cells {report['cells'][last]:.1%}  loss {report['loss'][last]:.4f}"

    def parameters(self) -> Parameters:
        return count_reasoner(self.recipe.architecture)

    def tokenizer(self) -> str | None:
        return None

    def position(self) -> dict[str, Any]:
        return {**self.running.state(), "finished": self.finished}

    def probe(self) -> float:
        return probe_loss(self.engine, self.recipe, self.device)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        carry = self.running.tensors()
        return {f"{CARRY}.safetensors": carry} if carry else {}

    def resume(self, resumed: Resumed, checkpoint: Path) -> list[str]:
        kept = resumed.state.loader
        notes = self.running.resume(kept, checkpoint) if kept else []
        self.finished = dict(kept["finished"]) if kept else self.finished
        refuse_unlike([self.probe], resumed, checkpoint.parent, self.recipe.train.precision)
        return notes


open_regime = Puzzles
"""What pretrain/trainer.py calls."""


def build_reasoner(recipe: PuzzleRecipe, device: torch.device) -> Reasoner:
    """The recipe's model in fp32, compiled if the recipe says so. Its first weights depend on train.seed alone."""
    model = build(recipe.architecture, device=device, seed=recipe.train.seed)
    if recipe.train.compile:
        model.compile_maps()
    return model


def shares(finished: dict[str, float]) -> dict[str, float]:
    """What the sums over finished puzzles say of one; not a number where none has finished."""
    count, cells, exact, halting, steps = (finished[name] for name in FINISHED)

    def a_puzzle(total: float) -> float:
        return total / count if count else math.nan

    means = {"exact": exact, "cells": cells, "halting_right": halting, "mean_steps": steps}
    return {"finished": count} | {name: a_puzzle(total) for name, total in means.items()}
