"""The records of a model refuse what cannot be built, and say which field, which value and what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig, SolverConfig
from model.language_model import build
from tests.model.support import configuration, random_tokens


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        (BackboneConfig, {"width": 0}, "model.width"),
        (BackboneConfig, {"width": 100, "heads": 6}, "model.heads"),
        (BackboneConfig, {"width": 30, "heads": 6}, "even"),
        (BackboneConfig, {"heads": 6, "kv_heads": 4}, "model.kv_heads"),
        (BackboneConfig, {"backbone_layers": 0}, "model.backbone_layers"),
        (BackboneConfig, {"vocabulary_size": 1}, "model.vocabulary_size"),
        (AttractorConfig, {"layers": 0}, "attractor.layers"),
        (AttractorConfig, {"gate_initial": 0.8, "gate_maximum": 0.7}, "attractor.gate_initial"),
        (AttractorConfig, {"gate_initial": 0.0}, "attractor.gate_initial"),
        (SolverConfig, {"tolerance": 0.0}, "solver.tolerance"),
        (SolverConfig, {"min_iterations": 5, "max_iterations": 4}, "solver.min_iterations"),
        (SolverConfig, {"min_iterations": 0}, "solver.min_iterations"),
        (SolverConfig, {"history": 0}, "solver.history"),
        (SolverConfig, {"damping": 0.0}, "solver.damping"),
        (SolverConfig, {"damping": 1.1}, "solver.damping"),
        (GradientConfig, {"steps": 0}, "gradient.steps"),
        (GradientConfig, {"damping": 0.0}, "gradient.damping"),
    ],
)
def test_impossible_values_are_refused_by_name(make: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as refusal:
        make(**fields)
    assert any(str(value) in str(refusal.value) for value in fields.values()), "the message must show the value"


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (BackboneConfig, {"kv_heads": 0}),
        (BackboneConfig, {"kv_heads": -2}),
        (BackboneConfig, {"width": 16, "heads": 2, "value_embeddings": True}),  # fewer channels than the value gate reads
        (BackboneConfig, {"mlp_width": 0}),
        (BackboneConfig, {"rope_base": 0.0}),
        (BackboneConfig, {"rope_base": float("nan")}),
        (BackboneConfig, {"norm_eps": -1.0}),
        (BackboneConfig, {"norm_eps": float("inf")}),
        (SolverConfig, {"ridge": -1.0}),
        (GradientConfig, {"clip": 0.0}),
        (GradientConfig, {"clip": -1.0}),
        (GradientConfig, {"max_iterations": 0}),
        (GradientConfig, {"tolerance": 0.0}),
        (GradientConfig, {"convergence_penalty": -1.0}),
        (GradientConfig, {"jacobian_penalty": -1.0}),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else None,
)
def test_values_that_would_fail_later_or_be_ignored_are_refused(make: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(fields)))):
        make(**fields)


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SolverConfig().tolerance = 1.0  # type: ignore[misc]


def test_derived_sizes() -> None:
    config = BackboneConfig(width=96, heads=6, kv_heads=2)
    assert (config.head_dim, config.key_value_heads, config.hidden) == (16, 2, 384)
    assert BackboneConfig(width=96, heads=6, mlp_width=100).hidden == 100
    assert BackboneConfig(width=96, heads=6).key_value_heads == 6


@pytest.mark.parametrize(("layers", "tables"), [(1, [0]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_sit_on_every_other_block_the_last_included(layers: int, tables: list[int]) -> None:
    config = BackboneConfig(backbone_layers=layers, value_embeddings=True)
    assert [layer for layer in range(layers) if config.has_value_embedding(layer)] == tables
    assert not any(BackboneConfig(backbone_layers=layers).has_value_embedding(layer) for layer in range(layers))


def test_fixed_counts_are_known() -> None:
    assert SolverConfig(min_iterations=4, max_iterations=4).fixed
    assert not SolverConfig(min_iterations=4, max_iterations=5).fixed


def test_defaults_make_a_model() -> None:
    assert ModelConfig().model.kind == "attractor"
    with pytest.raises(ValueError, match="vocabulary_size"):
        build(ModelConfig(), device="meta")


@pytest.mark.parametrize("module", ["model", "model.config", "model.cost"])
def test_planning_needs_no_torch(module: str) -> None:
    root = Path(__file__).resolve().parents[2]
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_every_accepted_shape_runs(heads: int, kv_heads: int | None) -> None:
    config = configuration(model={"heads": heads, "kv_heads": kv_heads}, solver={"tolerance": 1e-2})
    loss, _ = build(config)(random_tokens(1, 1), random_tokens(1, 1))  # one token: the shortest sequence there is
    assert loss.isfinite()
