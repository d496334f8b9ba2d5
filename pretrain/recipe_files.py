"""Recipe files: where a named one lies, which files it stands on (`base:`), and the sweep it may be. No torch.

    attractor-770m.yaml   base: attractor-140m          ->  layers: (origin, sections) of attractor-140m, then of attractor-770m
    ablation-start.yaml   base: edu-1m, sweep: ...       ->  sweep_of: what each member sets (pretrain/sweeps.py)

What the sections hold is checked by pretrain/config.py. Refused here: names and files that do not exist (the nearest name is
offered), files that cannot be read, a base that stands on itself, a base that is a sweep.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import Refusal
from pretrain.keys import LANGUAGE, Schema
from pretrain.overrides import parse_yaml
from pretrain.reasoning.sections import REASONING
from pretrain.sweeps import Settings, parse_sweep

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
"""Named recipes: data beside the code, read as files (this room imports nothing of launchers)."""

LANGUAGE_REGIME, REASONING_REGIME = "language", "reasoning"
REGIMES = (LANGUAGE_REGIME, REASONING_REGIME)
"""What a recipe may say of itself in `regime:`; one that says nothing, and none of whose bases does, is of language."""


def recipe_names(regime: str | None = None) -> list[str]:
    """Names of the recipes that ship with the project, of one regime or of both, sweeps left out."""
    return _shipped(sweeps=False, regime=regime)


def sweep_names() -> list[str]:
    """Names of the shipped recipes that are sweeps."""
    return _shipped(sweeps=True)


def _shipped(*, sweeps: bool, regime: str | None = None) -> list[str]:
    def wanted(text: str) -> bool:  # the text alone, since every start of the command line asks
        puzzles = re.search(rf"^regime: {REASONING_REGIME}", text, re.MULTILINE) is not None
        return bool(re.search(r"^sweep:", text, re.MULTILINE)) == sweeps and regime in (None, REGIMES[puzzles])

    return sorted(path.stem for path in RECIPES.glob("*.yaml") if wanted(path.read_text(encoding="utf-8")))


def recipe_file(name_or_path: str, folder: Path) -> Path:
    """The file of a recipe: a shipped name, or a path (from `folder` when relative)."""
    if "/" not in name_or_path and not name_or_path.endswith((".yaml", ".yml")):
        file = RECIPES / f"{name_or_path}.yaml"
        if file.is_file():
            return file
        close = difflib.get_close_matches(name_or_path, [*recipe_names(), *sweep_names()], n=1, cutoff=0.5)
        hint = f"Did you mean `{close[0]}`?" if close else f"Recipes: {', '.join(recipe_names())}."
        raise Refusal(f"There is no recipe named `{name_or_path}`. {hint} Give a file of your own by its path: ./{name_or_path}.yaml.")
    file = folder / name_or_path
    if not file.is_file():
        raise Refusal(f"There is no recipe file {file}: give the path of a YAML file, or one of the names {', '.join(recipe_names())}.")
    return file


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    """What errors call a recipe file, and what is written in it."""
    origin = f"the recipe {file.stem!r}" if file.parent == RECIPES else str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"The recipe {file} cannot be read: {error}. It must be UTF-8 text that this user may read.") from error
    return origin, dict(mapping(parse_yaml(text, origin), origin))


def layers(name_or_path: str, folder: Path, below: Sequence[Path] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(origin, sections) of a recipe, its bases first."""
    file = recipe_file(name_or_path, folder)
    origin, body = _read(file)
    if file.resolve() in below:
        circle = " -> ".join(path.stem for path in (*below, file))
        raise Refusal(f"{origin} is its own base: {circle}. One of these must name another base.")
    if body.pop("sweep", None) is not None and below:
        raise Refusal(f"{origin} is a sweep, and cannot be the base of {below[-1].stem}: name the base of that sweep in its place.")
    body.pop("regime", None)
    base = body.pop("base", None)
    if base is not None:
        yield from layers(str(base), file.parent, (*below, file.resolve()))
    yield origin, body


def regime_of(name_or_path: str, folder: Path) -> str:
    """What a recipe's file, or the first of its bases that says so, names as its regime. Raises Refusal for one that there is not, and for
    a base of another.
    """
    stated: list[tuple[str, str]] = []  # (regime, origin), the file's own first
    file: Path | None = recipe_file(name_or_path, folder)
    seen: list[Path] = []
    while file is not None and file.resolve() not in seen:  # a circle is refused when the layers are read
        seen.append(file.resolve())
        origin, body = _read(file)
        if "regime" in body or body.get("base") is None:
            stated.append((str(body.get("regime", LANGUAGE_REGIME)), origin))
        file = recipe_file(str(body["base"]), file.parent) if body.get("base") is not None else None
    for regime, origin in stated:
        if regime not in REGIMES:
            close = difflib.get_close_matches(regime, REGIMES, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"It is one of {', '.join(REGIMES)}."
            raise Refusal(f"{origin} says regime: {regime}, which there is not. {hint}")
        if regime != stated[0][0]:
            raise Refusal(f"{stated[0][1]} is of the regime {stated[0][0]}, and its base {origin} of {regime}: choose another base.")
    return stated[0][0] if stated else LANGUAGE_REGIME


def sweep_of(name_or_path: str) -> list[Settings]:
    """What each member sets, of a recipe that is a sweep (pretrain/sweeps.py); empty for an ordinary one. Raises Refusal."""
    origin, body = _read(recipe_file(name_or_path, Path.cwd()))
    return parse_sweep(body["sweep"], origin, schema_of(name_or_path)) if "sweep" in body else []


def schema_of(name_or_path: str) -> Schema:
    """The keys that a recipe may set: those of its regime. Raises Refusal."""
    return REASONING if regime_of(name_or_path, Path.cwd()) == REASONING_REGIME else LANGUAGE


def mapping(value: Any, source: str) -> Mapping[str, Any]:
    """The keys and values that `source` holds; none where it is empty. Raises Refusal for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refusal(f"{source} must hold keys and values, not {value!r}.")
    return value
