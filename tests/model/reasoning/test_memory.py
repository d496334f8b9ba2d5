"""Bytes that autograd keeps of a supervision step, against the closed form's estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import GradientConfig, SolverConfig
from model.reasoning.config import ReasonerConfig, ReasoningConfig, SupervisionConfig
from model.reasoning.memory import activation_bytes
from model.reasoning.reasoner import build

ROWS = 2
PHANTOM = GradientConfig(mode="phantom", steps=2)


def saved_bytes(config: ReasoningConfig) -> float:
    """A row, of the distinct storages that one forward pass keeps for backward, parameters apart."""
    model = build(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too: a freed storage's address would be used again

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    inputs = torch.ones(ROWS, config.model.cells or 0, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        thought = model(model.start(ROWS), inputs, torch.zeros(ROWS, dtype=torch.int64))
    assert thought.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ROWS


def configured(gradient: GradientConfig = PHANTOM, iterations: int = 1, **model: Any) -> ReasoningConfig:
    sizes = {"vocabulary_size": 11, "cells": 81, "prefix": 8, "width": 64, "heads": 4, "layers": 2}
    steps = 1 if model.get("kind") == "transformer" else 16
    solver = SolverConfig(min_iterations=iterations, max_iterations=iterations)
    return ReasoningConfig(ReasonerConfig(**{**sizes, **model}), SupervisionConfig(steps=steps), solver, gradient)


CASES: dict[str, ReasoningConfig] = {
    "trm": configured(kind="trm"),
    "wide": configured(kind="trm", width=128, mlp_width=160, layers=3, inner_cycles=2),
    "mlp": configured(kind="trm", mixing="mlp", positions="none"),
    "learned": configured(kind="trm", positions="learned"),
    "hrm": configured(kind="hrm"),
    "transformer": configured(kind="transformer"),
    "attractor": configured(kind="attractor"),
    "one-step": configured(GradientConfig(), kind="attractor"),
    "whole cycle": configured(kind="attractor", solve="yz", inner_cycles=3),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_estimate_is_near(config: ReasoningConfig) -> None:
    assert saved_bytes(config) == pytest.approx(activation_bytes(config, 4), rel=0.03)


def test_cycles_and_iterations_before_the_last_keep_nothing() -> None:
    kept = {saved_bytes(configured(kind="attractor", outer_cycles=cycles, iterations=n)) for cycles, n in ((1, 1), (3, 1), (3, 6))}
    assert len(kept) == 1
