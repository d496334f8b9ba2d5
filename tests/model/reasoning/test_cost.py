"""The closed forms of parameters and FLOPs against models that are built and operations that are counted while they run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.cost import Work
from model.reasoning.config import ReasonerConfig, ReasoningConfig, SupervisionConfig
from model.reasoning.cost import count_reasoner, planned_work, reasoner_flops
from model.reasoning.reasoner import build
from model.reasoning.supervision import supervise
from tests.model.reasoning.support import CELLS, KINDS, MLP, begun, grids, of_kind, reasoning

ROWS = 2
OTHERS: dict[str, ReasoningConfig] = {
    "learned": reasoning(kind="trm", positions="learned", inner_cycles=1, identifiers=3),
    "no prefix": reasoning(kind="trm", prefix=0, layers=1),
    "attractor-mlp": reasoning(kind="attractor", **MLP),
    "one step": reasoning(kind="attractor", gradient={"mode": "one_step", "steps": 1}),
    "jacobian": reasoning(kind="attractor", gradient={"jacobian_penalty": 0.1}),
    "jacobian-yz": reasoning(kind="attractor", solve="yz", inner_cycles=2, gradient={"jacobian_penalty": 0.1}),
    "jacobian-mlp": reasoning(kind="attractor", gradient={"jacobian_penalty": 0.1}, **MLP),
    "q-learning": reasoning(kind="attractor", supervision={"halting": "q_learning"}),
    "q-learning-yz": reasoning(kind="attractor", solve="yz", supervision={"halting": "q_learning"}),
}
CASES = {kind: of_kind(kind) for kind in KINDS} | OTHERS


class NoModules(nullcontext):  # type: ignore[type-arg]
    """In place of the counter's module hooks, which do not survive autograd.grad inside a forward pass."""

    parents = frozenset({"Global"})


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_flops_are_those_counted(case: str) -> None:
    config = CASES[case]
    model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_reasoner(config).total
    carry, counter = begun(model, grids(ROWS), grids(ROWS, 1)), FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    with counter:
        done = supervise(model, carry, config.supervision, carry.steps)
        done.loss.backward()
    work = Work(float(done.record["solver_evaluations"]), float(done.record["applications"]), 0.0)
    assert work == planned_work(replace(config, solver=replace(config.solver, expected_iterations=3.0)))  # the count of these solvers
    assert reasoner_flops(config, work).hardware * ROWS * CELLS == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_an_adaptive_solve_counts_what_it_computes() -> None:
    config = reasoning(kind="attractor", outer_cycles=1, solver={"min_iterations": 1, "max_iterations": 12, "tolerance": 1e-2})
    model = build(config)
    with torch.no_grad():
        thought = model(model.start(4), grids(4), torch.zeros(4, dtype=torch.int64))
    # without gradient: the solve, k = 2 more, and the update of y; compaction makes the solve cost its mean iterations
    assert float(thought.record["solver_evaluations"]) == pytest.approx(float(thought.record["solver_iterations"]) + 3)
    assert float(thought.record["applications"]) == 0


SUDOKU: dict[str, Any] = {"vocabulary_size": 11, "cells": 81}


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ({"kind": "trm"}, 6.83),
        ({"kind": "trm", "layers": 8}, 27.28),  # the authors' log of the 27M Attractor prints 27.275, without the puzzle embedding
        ({"kind": "trm", "mixing": "mlp", "positions": "none"}, 5.03),  # 5M in the paper
        ({"kind": "hrm", "layers": 4, "prefix": 1}, 27.28),
        ({"kind": "transformer", "layers": 8}, 27.28),
        ({"kind": "attractor", "layers": 8}, 27.28),
    ],
)
def test_published_sizes(model: dict[str, Any], millions: float) -> None:
    steps = SupervisionConfig(steps=1 if model["kind"] == "transformer" else 16)
    config = ReasoningConfig(ReasonerConfig(**SUDOKU, **model), steps)
    assert count_reasoner(config).total == pytest.approx(millions * 1e6, abs=5e3)
    assert sum(parameter.numel() for parameter in build(config, device="meta").parameters()) == count_reasoner(config).total
    assert count_reasoner(config).total - 512 == 27_275_266 or millions < 27


def test_published_work() -> None:
    assert planned_work(ReasoningConfig(ReasonerConfig(kind="trm"))) == Work(14, 7, 0)
    hrm = ReasonerConfig(kind="hrm", outer_cycles=2, inner_cycles=2)
    assert planned_work(ReasoningConfig(hrm, SupervisionConfig(halting="q_learning"))) == Work(4 + 6, 2, 0)
