"""A recipe in the making: plain values by section and key, gathered layer by layer, with the place where each was written. No torch.

    draft = Draft(schema)
    draft.add(mapping of sections, origin) / draft.put("solver.tolerance", 1e-3, origin)
    draft.checked(Record, source)          the frozen record, or one paragraph: key, value, where it was written, what is wanted

Also the arithmetic of batches that every regime shares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from pretrain.errors import Refusal
from pretrain.keys import Schema
from pretrain.recipe_files import mapping
from pretrain.sections import Section, SharedTrainSection

Record = TypeVar("Record", bound=Section)


class Draft:
    """Of the keys that `schema` names; others are refused as they come."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.tree: dict[str, dict[str, Any]] = {}
        self.origins: dict[str, str] = {}

    def add(self, layer: Mapping[str, Any], origin: str) -> None:
        """Lays a mapping of sections over what is there. Raises Refusal for keys that do not exist."""
        for section, body in layer.items():
            if section not in self.schema.sections:
                raise self.schema.unknown(str(section), origin)
            for key, value in mapping(body, f"The section {section!r} in {origin}").items():
                self.put(f"{section}.{key}", value, origin)

    def put(self, dotted: str, value: Any, origin: str) -> None:
        """Sets one key, or a whole section. Raises Refusal for one that does not exist."""
        if dotted in self.schema.sections:
            self.add({dotted: value}, origin)
        elif dotted not in self.schema.keys:
            raise self.schema.unknown(dotted, origin)
        else:
            section, _, key = dotted.partition(".")
            self.tree.setdefault(section, {})[key] = self.schema.fit(dotted, value)
            self.origins[dotted] = origin

    def checked(self, record: type[Record], source: str) -> Record:
        """The checked recipe. Raises Refusal with the key, its value, where it was written and what is wanted."""
        run = self.tree.setdefault("run", {})
        if not run.get("dir"):
            run["dir"] = f"runs/{run.get('name') or 'unnamed'}"
        try:
            text = json.dumps(self.tree, allow_nan=False)
        except ValueError as error:
            raise Refusal(f"{source} holds a number that is not finite (.inf or .nan): every number of a recipe must be finite.") from error
        try:
            return record.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise Refusal(self._explain(error, source)) from error

    def _explain(self, error: ValidationError, source: str) -> str:
        first = error.errors()[0]
        if "error" in first.get("ctx", {}):
            return f"{first['ctx']['error']} (In {source}.)"
        dotted = ".".join(str(part) for part in first["loc"][:2])
        if first["type"] == "missing" and dotted not in self.origins:
            missing = dotted if dotted in self.schema.keys else self.schema.budget
            return f"{missing} is missing in {source}: add it, {self.schema.wanted(missing)}."
        section, _, key = dotted.partition(".")
        value = self.tree[section][key]
        ranged = len(first["loc"]) == 2 and first["type"].startswith(("greater_than", "less_than"))
        remedy = first["msg"].replace("Input should", "it must") if ranged else f"expected {self.schema.wanted(dotted)}"
        return f"{dotted}={value if isinstance(value, str) else json.dumps(value)} (from {self.origins[dotted]}): {remedy}."


def accumulation(train: SharedTrainSection, data_ranks: int) -> int:
    """Micro-batches a rank takes in each step. Raises Refusal that names legal neighbours when it is not whole."""
    batch, micro = train.global_batch, train.micro_batch
    unit = micro * data_ranks
    if batch % unit == 0:
        return batch // unit
    batches = [str(unit * k) for k in (batch // unit, batch // unit + 1) if k > 0]
    remedies = [f"train.global_batch={' or '.join(batches)}"]
    if batch % data_ranks == 0:
        share = batch // data_ranks
        micros = [m for m in range(1, share + 1) if share % m == 0]
        below, above = [m for m in micros if m < micro][-1:], [m for m in micros if m > micro][:1]
        remedies.append("train.micro_batch=" + " or ".join(str(m) for m in below + above))
    ranks = [r for r in range(1, batch // micro + 1) if batch % (micro * r) == 0]
    if ranks:
        remedies.append("data ranks " + ", ".join(str(r) for r in sorted(ranks, key=lambda r: abs(r - data_ranks))[:3]))
    raise Refusal(
        f"train.global_batch={batch} does not divide into micro-batches of train.micro_batch={micro} on {data_ranks} data "
        f"rank{'s' if data_ranks > 1 else ''} ({unit} at a time). Use {'; or '.join(remedies)}."
    )
