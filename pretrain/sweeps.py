"""The `sweep:` of a recipe file: which keys vary, and the members that makes. No torch.

    sweep:                                         sweep:
      attractor.injection: [additive, concat]        - {attractor.layers: 1, model.backbone_layers: 3}
      gradient.mode: [one_step, adjoint]             - {attractor.layers: 2, model.backbone_layers: 2}

On the left every value with every other (four members); on the right the members themselves, for keys that vary together.
Refused: keys that do not exist, keys that say where a run is and not what it is, a member that is listed twice, members that
set other keys than the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from pretrain.errors import Refusal
from pretrain.keys import Schema

Settings = dict[str, Any]
"""What a member sets: values by dotted key."""

_ITS_OWN = ("run.dir", "run.name")


def parse_sweep(value: Any, origin: str, schema: Schema) -> list[Settings]:
    """The members that the `sweep:` written in `origin` makes, in order, of keys of `schema`. Raises Refusal."""
    if isinstance(value, Mapping) and value:
        return product(value, origin, schema)
    if isinstance(value, list) and value and all(isinstance(member, Mapping) and member for member in value):
        members = [{str(key): _fitted(str(key), setting, origin, schema) for key, setting in member.items()} for member in value]
        for member in members:
            if member.keys() != members[0].keys():
                raise Refusal(
                    f"The sweep in {origin} has members that set {', '.join(members[0])} and one that sets {', '.join(member)}: every "
                    "member must set the same keys."
                )
        return distinct(members, origin)
    raise Refusal(
        f"The sweep in {origin} must be keys with lists of values, such as {{solver.tolerance: [1e-2, 1e-3]}}, or a list of members, such "
        "as [{attractor.layers: 1, model.backbone_layers: 3}, {attractor.layers: 2, model.backbone_layers: 2}]."
    )


def product(axes: Mapping[str, Any], origin: str, schema: Schema) -> list[Settings]:
    """Every value of every key with every value of the others; the last key varies fastest. Raises Refusal."""
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise Refusal(f"The sweep in {origin} gives {key} no list of values: write {key}: [VALUE, VALUE, ...].")
    lists = [[_fitted(str(key), value, origin, schema) for value in values] for key, values in axes.items()]
    return distinct([dict(zip(map(str, axes), values, strict=True)) for values in itertools.product(*lists)], origin)


def distinct(members: list[Settings], origin: str) -> list[Settings]:
    """The members as they are. Raises Refusal where two are the same."""
    for number, member in enumerate(members):
        if member in members[:number]:
            said = " ".join(f"{key}={value}" for key, value in member.items())
            raise Refusal(f"The sweep in {origin} has the member {said} twice: leave one of them out.")
    return members


def _fitted(key: str, value: Any, origin: str, schema: Schema) -> Any:
    if key not in schema.keys:
        raise schema.unknown(key, origin)
    if key in _ITS_OWN:
        raise Refusal(f"The sweep in {origin} varies {key}, which every member is given by itself: leave it out (--out names the folder).")
    return schema.fit(key, value)
