"""Language models as a regime (pretrain/regime.py): token loaders, the engine of a Recipe, the step over micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Batch
from model.cost import Parameters, Work, count_parameters, training_flops
from pretrain import step as steps
from pretrain.checkpoint import Resumed
from pretrain.config import Recipe
from pretrain.engine import build_engine, build_model
from pretrain.evaluate import evaluate, text_bytes_of
from pretrain.ledger import Ledger
from pretrain.mesh import Mesh
from pretrain.probe import probe_loss, refuse_other_probe
from pretrain.regime import Beat, Stepped
from pretrain.run_data import RunData, tokenizer_text


class Language:
    """A run of a resolved Recipe on this rank."""

    rate_keys = "optimizer.lr or optimizer.muon_lr"

    def __init__(self, recipe: Recipe, device: torch.device, mesh: Mesh, accumulation: int, data: RunData) -> None:
        self.recipe, self.device, self.mesh, self.accumulation = recipe, device, mesh, accumulation
        length = recipe.data.sequence_length or 0
        self.step_tokens, self.total_steps = recipe.train.global_batch * length, recipe.steps(length)
        self.schedule = recipe.schedule
        self.loader, self.validation = data
        self.text_bytes = text_bytes_of(recipe, device)
        self.engine = build_engine(recipe, build_model(recipe, device, mesh), accumulation, mesh)
        a_token = partial(training_flops, recipe.architecture, length, recompute=recipe.train.recompute)
        self.ledger = Ledger(a_token, length)

    def step(self, *, number: int, stop_requested: bool, beat: Beat) -> Stepped:
        batches = _watched(self.loader, f"(after step {number})", "micro-batch", beat)
        mask = self.recipe.data.mask_documents
        found = steps.train_step(self.engine, batches, self.accumulation, self.mesh, mask_documents=mask, stop_requested=stop_requested)
        solver = found.solver or {}
        work = Work(solver.get("solver_evaluations", 0.0), solver.get("applications", 0.0), solver.get("products", 0.0))
        return Stepped(found.loss, found.grad_norm, found.applied, found.stop, found.own_iterations, work, solver)

    def evaluate(self, beat: Beat) -> dict[str, Any]:
        batches = _watched(self.validation, "(evaluation)", "validation batch", beat)
        depths, mask = self.recipe.evaluation.iterations, self.recipe.data.mask_documents
        report = evaluate(self.engine, batches, depths, self.device, self.mesh, mask_documents=mask, text_bytes=self.text_bytes)
        return {**report, "predicted_tokens": report["tokens"]}

    def in_words(self, report: dict[str, Any]) -> str:
        losses = "  ".join(f"{depth}: {loss:.4f}" for depth, loss in report["loss"].items())
        return losses if "iterations" in report else f"loss {losses[3:]}"

    def parameters(self) -> Parameters:
        return count_parameters(self.recipe.architecture)

    def tokenizer(self) -> str | None:
        return tokenizer_text(self.recipe)

    def position(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def probe(self) -> float:
        return probe_loss(self.engine, self.recipe, self.device, self.mesh)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def resume(self, resumed: Resumed, checkpoint: Path) -> list[str]:
        if resumed.state.loader:  # an import has been trained on nothing yet
            self.loader.load_state_dict(resumed.state.loader)
        refuse_other_probe(self.engine, self.recipe, self.device, self.mesh, resumed, checkpoint.parent)
        return []


open_regime = Language
"""What pretrain/trainer.py calls."""


def _watched(batches: Iterable[Batch], when: str, doing: str, beat: Beat) -> Iterator[Batch]:
    """The batches; each one taken is progress."""
    for number, batch in enumerate(batches, 1):
        beat(f"{doing} {number} {when}")
        yield batch
