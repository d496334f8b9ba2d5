"""What each parameter is for, told by the module that owns it, never by its name.

Optimizers choose by role: Muon for BACKBONE_MATRIX, a learning rate of their own for the attractor's, no decay for vectors.
"""

from __future__ import annotations

from enum import StrEnum

from torch import nn

from model.attention import ValueGate
from model.backbone import Backbone
from model.language_model import LanguageModel
from model.layers import ChannelGate, RMSNorm
from model.looped import DiagonalInjection, Loop
from model.refine import Refine


class Role(StrEnum):
    EMBEDDING = "embedding"
    VALUE_EMBEDDING = "value_embedding"
    HEAD = "head"
    """An untied unembedding."""
    BACKBONE_MATRIX = "backbone_matrix"
    BACKBONE_VECTOR = "backbone_vector"
    """Norms and gates: of the backbone, and the final norm."""
    LOOP_MATRIX = "loop_matrix"
    """Into the state of a loop, and out of it."""
    ATTRACTOR_MATRIX = "attractor_matrix"
    ATTRACTOR_VECTOR = "attractor_vector"
    PUZZLE_EMBEDDING = "puzzle_embedding"
    """Of a reasoner (model/reasoning/roles.py); language models have none."""


def parameter_roles(model: LanguageModel) -> dict[str, Role]:
    """Role of every parameter, by its name in model.named_parameters()."""
    owners: dict[int, Role] = {}

    def claim(module: nn.Module, role: Role) -> None:
        for parameter in module.parameters():
            owners[id(parameter)] = role  # narrower claims come later and win

    claim(model, Role.BACKBONE_MATRIX)
    inside: set[nn.Module] = set()
    if isinstance(model.refine, Refine):
        claim(model.refine, Role.ATTRACTOR_MATRIX)
        inside = set(model.refine.modules())
    if isinstance(model.refine, Loop) and model.refine.readout is not None:
        claim(model.refine.readout, Role.LOOP_MATRIX)
    for module in model.modules():
        if isinstance(module, DiagonalInjection):
            claim(module, Role.BACKBONE_VECTOR)
            claim(module.input, Role.LOOP_MATRIX)
        if isinstance(module, (RMSNorm, ChannelGate, ValueGate)):
            claim(module, Role.ATTRACTOR_VECTOR if module in inside else Role.BACKBONE_VECTOR)
        if isinstance(module, Backbone):
            claim(module.value_embeddings, Role.VALUE_EMBEDDING)
    claim(model.embedding, Role.EMBEDDING)
    if model.head is not None:
        claim(model.head, Role.HEAD)
    return {name: owners[id(parameter)] for name, parameter in model.named_parameters()}
