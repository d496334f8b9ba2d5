"""The records of a reasoner refuse what cannot be built, or would be ignored, and say which field, which value and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.config import GradientConfig, SolverConfig
from model.reasoning.config import ReasonerConfig, ReasoningConfig, SupervisionConfig, published_hidden
from model.reasoning.reasoner import build

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (ReasonerConfig, {"width": 0}, "model.width"),
    (ReasonerConfig, {"width": 60, "heads": 8}, "model.width"),
    (ReasonerConfig, {"width": 24, "heads": 8}, "even"),
    (ReasonerConfig, {"layers": 0}, "model.layers"),
    (ReasonerConfig, {"outer_cycles": 0}, "model.outer_cycles"),
    (ReasonerConfig, {"inner_cycles": 0}, "model.inner_cycles"),
    (ReasonerConfig, {"vocabulary_size": 1}, "model.vocabulary_size"),
    (ReasonerConfig, {"cells": 0}, "model.cells"),
    (ReasonerConfig, {"mlp_width": 0}, "model.mlp_width"),
    (ReasonerConfig, {"prefix": -1}, "model.prefix"),
    (ReasonerConfig, {"prefix": 0, "identifiers": 2}, "model.identifiers"),
    (ReasonerConfig, {"mixing": "mlp"}, "model.positions=rope"),
    (ReasonerConfig, {"mixing_width": 8}, "model.mixing_width"),
    (ReasonerConfig, {"norm_eps": 0.0}, "model.norm_eps"),
    (ReasonerConfig, {"start_std": 0.0}, "model.start_std"),
    (ReasonerConfig, {"rope_base": 1.0}, "model.rope_base"),
    (ReasonerConfig, {"path_noise": -0.1}, "model.path_noise"),
    (ReasonerConfig, {"step_size": 0.0}, "model.step_size"),
    (ReasonerConfig, {"step_size": 1.5}, "model.step_size"),
    (ReasonerConfig, {"kind": "hrm", "path_noise": 0.1}, "model.path_noise"),
    (ReasonerConfig, {"kind": "transformer", "start": "random"}, "model.start"),
    (ReasonerConfig, {"kind": "hrm", "step_size": 0.9}, "model.step_size"),
    (ReasonerConfig, {"kind": "trm", "solve": "yz"}, "model.solve"),
    (SupervisionConfig, {"steps": 0}, "supervision.steps"),
    (SupervisionConfig, {"exploration": 1.1}, "supervision.exploration"),
    (ReasoningConfig, {"model": ReasonerConfig(kind="transformer")}, "supervision.steps=16"),
    (ReasoningConfig, {"solver": SolverConfig(start="noise")}, "solver.start=noise"),
    (ReasoningConfig, {"gradient": GradientConfig(mode="adjoint")}, "gradient.mode=adjoint"),
]


@pytest.mark.parametrize(("make", "fields", "named"), WRONG, ids=lambda value: value if isinstance(value, str) else None)
def test_impossible_values_are_refused_by_name(make: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(**fields)


@pytest.mark.parametrize("missing", ["vocabulary_size", "cells"])
def test_what_the_data_says_must_be_there_to_build(missing: str) -> None:
    with pytest.raises(ValueError, match=f"model.{missing}"):
        build(ReasoningConfig(ReasonerConfig(**{"vocabulary_size": 11, "cells": 81, missing: None})), device="meta")


def test_published_widths() -> None:
    assert published_hidden(512) == 1536
    assert published_hidden(97) == 512  # 81 cells and 16 positions before them
    assert ReasonerConfig(cells=81).length == 97


def test_a_jacobian_penalty_goes_with_phantom() -> None:
    assert GradientConfig(mode="phantom", steps=2, jacobian_penalty=1e-3).jacobian_penalty == 1e-3


@pytest.mark.parametrize("module", ["model.reasoning.config", "model.reasoning.cost"])
def test_planning_needs_no_torch(module: str) -> None:
    root = Path(__file__).resolve().parents[3]
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
