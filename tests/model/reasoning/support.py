"""Tiny reasoners, and puzzles to run them on."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from model.config import GradientConfig, SolverConfig
from model.reasoning.config import ReasonerConfig, ReasoningConfig, SupervisionConfig
from model.reasoning.reasoner import Reasoner, build
from model.reasoning.supervision import Carry, empty_carry, refill

CELLS, VOCABULARY = 16, 6
TINY = {"vocabulary_size": VOCABULARY, "cells": CELLS, "width": 32, "heads": 2, "mlp_width": 48, "prefix": 2}
MLP = {"mixing": "mlp", "mixing_width": 24, "positions": "none"}

KINDS: dict[str, dict[str, Any]] = {
    "trm": {"kind": "trm", "inner_cycles": 2},
    "trm-mlp": {"kind": "trm", "inner_cycles": 2, **MLP},
    "hrm": {"kind": "hrm", "outer_cycles": 2, "inner_cycles": 2},
    "transformer": {"kind": "transformer"},
    "attractor": {"kind": "attractor"},
    "attractor-yz": {"kind": "attractor", "solve": "yz", "inner_cycles": 1},
    "equilibrium": {"kind": "attractor", "start": "random", "start_std": 0.3, "path_noise": 0.01, "step_size": 0.95},
}


def reasoning(
    supervision: dict[str, Any] | None = None, solver: dict[str, Any] | None = None, gradient: dict[str, Any] | None = None, **model: Any
) -> ReasoningConfig:
    """A configuration of tiny sizes; a transformer's supervision.steps is 1, a solver's count 3, a gradient phantom-2."""
    steps = {"steps": 1} if model.get("kind") == "transformer" else {}
    return ReasoningConfig(
        ReasonerConfig(**{**TINY, **model}),
        SupervisionConfig(**{**steps, **(supervision or {})}),
        SolverConfig(**{"min_iterations": 3, "max_iterations": 3, **(solver or {})}),
        GradientConfig(**{"mode": "phantom", "steps": 2, **(gradient or {})}),
    )


def of_kind(kind: str, **sections: Any) -> ReasoningConfig:
    supervision = {"halting": "q_learning"} if kind == "hrm" else {}
    return reasoning(**{**KINDS[kind], **sections, "supervision": {**supervision, **sections.get("supervision", {})}})


def lively(config: ReasoningConfig, seed: int = 0) -> Reasoner:
    """A model in fp64 whose parameters are all random, the halting head and the puzzle embedding too."""
    model = build(config, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in (
            model.halting.weight,
            model.halting.bias,
            *(() if model.puzzle_embedding is None else (model.puzzle_embedding.weight,)),
        ):
            table.copy_(torch.randn(table.shape, dtype=torch.float64, generator=generator))
    return model


def grids(rows: int, seed: int = 0) -> Tensor:
    """[rows, CELLS] random tokens, none of them padding."""
    return torch.randint(1, VOCABULARY, (rows, CELLS), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sudokus(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(inputs, answers), each [rows, 16]: 4 x 4 Sudokus, tokens 1 for blank and 2 ... 5 for digits, half the cells given."""
    drawn, inputs, answers = random.Random(seed), [], []
    for _ in range(rows):
        digits = drawn.sample(range(2, 6), 4)
        lines = [band * 2 + line for band in drawn.sample(range(2), 2) for line in drawn.sample(range(2), 2)]
        columns = [band * 2 + column for band in drawn.sample(range(2), 2) for column in drawn.sample(range(2), 2)]
        solved = [digits[(2 * (r % 2) + r // 2 + c) % 4] for r in lines for c in columns]
        blank = set(drawn.sample(range(16), 8))
        answers.append(solved)
        inputs.append([1 if cell in blank else digit for cell, digit in enumerate(solved)])
    return torch.tensor(inputs, dtype=torch.uint8), torch.tensor(answers, dtype=torch.uint8)


def begun(model: Reasoner, inputs: Tensor, answers: Tensor) -> Carry:
    """A carry whose rows are these puzzles, at their start."""
    rows = len(inputs)
    carry = empty_carry(model.start(rows), inputs.shape[1])
    return refill(carry, inputs, answers, torch.zeros(rows, dtype=torch.int64), model.start(rows))
