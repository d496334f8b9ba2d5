"""What each parameter of a reasoner is for, in the roles of model/roles.py.

Published optimizers know two groups, the puzzle embedding and all the rest, and decay the rest alike, vectors included. The roles say more,
so that a recipe may.
"""

from __future__ import annotations

from model.reasoning.reasoner import Reasoner
from model.roles import Role


def parameter_roles(model: Reasoner) -> dict[str, Role]:
    """Role of every parameter, by its name in model.named_parameters()."""
    matrix = Role.ATTRACTOR_MATRIX if model.config.model.solves else Role.BACKBONE_MATRIX
    owners = {id(parameter): matrix for parameter in model.core.parameters()}
    owners[id(model.head.weight)] = owners[id(model.halting.weight)] = Role.HEAD
    owners[id(model.halting.bias)] = Role.BACKBONE_VECTOR
    for table, role in (
        (model.embedding, Role.EMBEDDING),
        (model.positions, Role.EMBEDDING),
        (model.puzzle_embedding, Role.PUZZLE_EMBEDDING),
    ):
        if table is not None:
            owners[id(table.weight)] = role
    return {name: owners[id(parameter)] for name, parameter in model.named_parameters()}
