"""Text to plain values: the YAML of recipes and the `section.key=value` of the command line.

Scalars follow YAML 1.2, where PyYAML follows 1.1 and surprises: `1e-3` and `2e9` are numbers, `off` and `no` are words,
`010` is ten, a date is a word. Underscores may group digits (2_000_000). Nothing but mappings, lists, words, numbers,
true, false and null can come out; tags are refused, and so is a key written twice.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from pretrain.errors import Refusal

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML fills it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)


_PlainLoader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_PlainLoader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_PlainLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_PlainLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.inf|\.Inf)$|\.nan$|\.NaN$"),
    list("-+.0123456789"),
)
_PlainLoader.add_constructor(_INT, lambda loader, node: int(node.value.replace("_", "")))


def parse_yaml(text: str, source: str) -> Any:
    """The value of one YAML document. Raises Refusal that names `source`, the line and what is wrong there."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise Refusal(f"{source} is not valid YAML{where}: {problem}. Values with special characters need quotes.") from error


def parse_override(text: str) -> tuple[str, Any]:
    """`train.tokens=2e9` -> ("train.tokens", 2e9). Raises Refusal for anything that is not `section.key=value`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*", key):
        raise Refusal(f"`{text}` is not an override: write section.key=value without spaces, such as train.tokens=2e9.")
    if not value.strip():
        raise Refusal(f"The override `{text}` has no value: write {key}=null to clear it, or leave it out.")
    return key, parse_yaml(value, f"The value of the override `{text}`")
