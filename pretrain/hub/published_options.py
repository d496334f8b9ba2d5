"""A published config.json, read option by option, so that at the end it is known what nothing read.

An option has a type, a default (the published dataclass's) or none, or one value that every model here has. Refused, with the file and the
option: a value of another type, an option that is missing, one that says something else than the models here do, one that is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pretrain.errors import Refusal

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null", dict: "a mapping"}


class Options:
    """A config.json, read option by option; what nothing read is known at the end."""

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self._config, self.where = config, where
        self._read: set[str] = set()

    def get(self, name: str, default: Any, *types: type) -> Any:
        """The option's value, of one of `types`; a number may be whole where a float is meant. Raises Refusal."""
        self._read.add(name)
        value = self._config.get(name, default)
        if float in types and type(value) is int:
            value = float(value)
        if type(value) not in types or (type(value) is float and not math.isfinite(value)):
            raise Refusal(f"{self.where} has {name}={value!r}, where {' or '.join(_WORDS[kind] for kind in types)} belongs.")
        return value

    def needed(self, name: str, *types: type) -> Any:
        """The same of an option that must be there."""
        if name not in self._config:
            raise Refusal(f"{self.where} has no {name}: it is not a whole configuration of a published model.")
        return self.get(name, None, *types)

    def fixed(self, name: str, value: Any, default: Any) -> None:
        """Raises Refusal unless the option has the value that every model here has."""
        self._read.add(name)
        if (found := self._config.get(name, default)) != value:
            raise Refusal(
                f"{self.where} has {name}={found!r}, which the models here lack (they have {name}={value!r}): imported without it, the "
                f"model would compute other numbers. It is not imported."
            )

    def refuse_rest(self, neutral: Set[str]) -> None:
        """Raises Refusal for an option that was not read and is not one of `neutral`."""
        if rest := self._config.keys() - self._read - neutral:
            raise Refusal(
                f"{self.where} has the option {min(rest)!r}, which the published models do not have: what it changes is not known here. "
                f"If it changes no number, take it out of a copy of the folder."
            )
