"""The role of every parameter of every option, against a table written by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from torch import nn

from model.language_model import build
from model.roles import Role, parameter_roles
from tests.model.support import configuration

# what a parameter's last names mean inside a block
MATRICES = ("query.weight", "key.weight", "value.weight", "out.weight", "up.weight", "gate.weight", "down.weight", "merge.weight")
VECTORS = ("attention_norm.weight", "mlp_norm.weight", "attention_gate.raw", "mlp_gate.raw", "value_gate.projection.weight")


def expected(name: str) -> Role:
    if name == "embedding.weight":
        return Role.EMBEDDING
    if name == "head.weight":
        return Role.HEAD
    if name == "norm.weight":
        return Role.BACKBONE_VECTOR
    if name.startswith("backbone.value_embeddings."):
        return Role.VALUE_EMBEDDING
    inside = name.startswith("refine.")
    if name.endswith(VECTORS):
        return Role.ATTRACTOR_VECTOR if inside else Role.BACKBONE_VECTOR
    assert name.endswith(MATRICES), f"{name}: a parameter that this table does not know"
    return Role.ATTRACTOR_MATRIX if inside else Role.BACKBONE_MATRIX


BACKBONES: list[dict[str, Any]] = [
    {"kind": kind, "mlp": mlp, "kv_heads": kv, "value_embeddings": values, "tied_embeddings": tied, "value_gate_channels": 8}
    for kind, mlp, kv, values, tied in product(("attractor", "transformer"), ("relu2", "swiglu"), (None, 1), (False, True), (True, False))
]


@pytest.mark.parametrize("injection", ["additive", "concat", "init_only", "cross_attention"])
def test_roles_of_every_option(injection: str) -> None:
    for backbone in BACKBONES:
        config = configuration(model={**backbone, "backbone_layers": 2}, attractor={"injection": injection, "layers": 2})
        model = build(config, device="meta")
        roles = parameter_roles(model)
        assert roles == {name: expected(name) for name, _ in model.named_parameters()}
        assert set(roles) == {name for name, _ in model.named_parameters()}


def test_roles_follow_the_owner_and_not_the_name() -> None:
    model = build(configuration(attractor={"injection": "concat"}))
    assert model.refine is not None
    before = sorted(parameter_roles(model).values())
    wrapper = nn.Module()  # the same modules under names that would mislead: an embedding called norm, a norm called matrix
    wrapper.matrix, wrapper.embedding = model.norm, model.refine.attractor
    model.refine.attractor = wrapper  # type: ignore[assignment]
    roles = parameter_roles(model)
    assert {role for name, role in roles.items() if name.startswith("refine.attractor.embedding.")} == {
        Role.ATTRACTOR_MATRIX,
        Role.ATTRACTOR_VECTOR,
    }
    assert len(roles) == len(before)


def test_matrices_are_matrices_and_vectors_are_small() -> None:
    model = build(configuration(model={"value_embeddings": True, "value_gate_channels": 8}))
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] in (Role.BACKBONE_MATRIX, Role.ATTRACTOR_MATRIX):
            assert parameter.ndim == 2, f"{name}: Muon takes matrices only"
