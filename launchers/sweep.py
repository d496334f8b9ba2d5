"""A sweep: the runs that a recipe's `sweep:` or lists of values on the command line make, and their table. No torch.

    attractor.injection=additive,concat gradient.mode=one_step,adjoint        four members, in this order of nesting
    evaluation.iterations=[0,auto]                                            one value: commas in brackets, braces and quotes do not divide

A key with several values on the command line replaces the file's own values of it; a key with one fixes it. Members that
then are the same are one. Each lies in DIR/<its values>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.series import Member, override, refuse_own
from launchers.sweep_rows import COLUMNS, NOTES, Row, cells
from pretrain import durable
from pretrain.config import stated, sweep_of
from pretrain.errors import Refusal
from pretrain.overrides import parse_override, parse_yaml
from pretrain.recipe_files import schema_of
from pretrain.run_folder import dump
from pretrain.sweeps import Settings, product

FOLDER = Path("sweeps")
_OPEN, _CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in order, and what each sets."""

    name: str
    out: Path
    settings: list[Settings]
    members: list[Member]


def make_sweep(recipe: str, words: Sequence[str], out: Path | None = None) -> Sweep:
    """The members of `recipe` with `words`, overrides of which some list several values. Raises Refusal where nothing is swept."""
    plain, axes = read_axes(words)
    refuse_own(plain)
    fixed = stated(plain) | axes.keys()
    own: list[Settings] = []
    for member in sweep_of(recipe) or [{}]:
        left = {key: value for key, value in member.items() if key not in fixed}
        own += [left] if left not in own else []
    settings = [{**member, **more} for member in own for more in (product(axes, "the command line", schema_of(recipe)) if axes else [{}])]
    if settings == [{}]:
        raise Refusal(
            f"Nothing is swept in {recipe}: give a key several values, such as solver.tolerance=1e-2,1e-3, or name a recipe with a "
            f"`sweep:` of which a key is left open. One run alone: attractor train {recipe}."
        )
    name = Path(recipe).name.removesuffix(".yml").removesuffix(".yaml")
    folder = out or FOLDER / name
    slugs = [slug(member) for member in settings]
    if twice := next((text for text in slugs if slugs.count(text) > 1), None):
        raise Refusal(
            f"Two members of the sweep would share the folder {folder / twice}: their values differ in signs alone. Sweep them apart."
        )
    members = [
        Member(text, recipe, (*plain, *(override(key, value) for key, value in member.items())), folder / text)
        for text, member in zip(slugs, settings, strict=True)
    ]
    return Sweep(name, folder, settings, members)


def read_axes(words: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """The overrides with one value, as they are, and the values of those with several by key. Raises Refusal."""
    plain, axes = [], {}
    for word in words:
        key, _, text = word.partition("=")
        values = split_values(text)
        if len(values) < 2:
            parse_override(word)  # refuses what is no override
            plain.append(word)
            continue
        if not all(value.strip() for value in values):
            raise Refusal(f"`{word}` lists an empty value: take the comma away that has nothing on one side.")
        axes[parse_override(f"{key}={values[0]}")[0]] = [parse_yaml(value, f"A value of `{word}`") for value in values]
    return plain, axes


def split_values(text: str) -> list[str]:
    """The parts between commas that stand in no brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in _OPEN) - (sign in _CLOSE)
            if sign == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += sign
    return parts


def slug(settings: Settings) -> str:
    """The values as a folder's name: `injection=concat,mode=adjoint`, with whole keys where last words would be the same."""
    words = [key.rpartition(".")[2] for key in settings]
    names = settings if len(set(words)) < len(words) else words
    shown = (f"{name}={value_text(value)}" for name, value in zip(names, settings.values(), strict=True))
    return ",".join(re.sub(r"[^\w.=+-]+", "-", text).strip("-") for text in shown)


def value_text(value: Any) -> str:
    """A value as tables show it."""
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def write(sweep: Sweep, rows: list[Row]) -> Path:
    """sweep.json and sweep.md in the sweep's folder; the latter is returned. Each whole or not at all."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    durable.write_atomically(sweep.out / "sweep.json", dump({"sweep": sweep.name, "members": rows}, indent=1) + "\n")
    keys, regime = list(sweep.settings[0]), rows[0]["regime"]
    lines = [[*keys, *COLUMNS[regime]], ["---"] * len(keys) + ["---:"] * len(COLUMNS[regime])]
    lines += [[*map(value_text, row["settings"].values()), *cells(row).values()] for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = f"# {sweep.name}\n\n{NOTES[regime]}\n\n"
    path = sweep.out / "sweep.md"
    durable.write_atomically(path, f"{head}{text}\n")
    return path
