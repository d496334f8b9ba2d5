"""Arms of a comparison: runs that differ in train.seed alone are one arm, whose figures are means over its seeds. No torch.

What says where a run is, how fast it runs and how often it is looked at (run, layout, checkpoint, telemetry, micro-batch, device ...)
does not make another arm, and puzzles are the same by hash, wherever they lie. An arm is called what the folders of its runs have in
common once seeds are taken out of their names; failing that, by the settings in which the arms differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrain.errors import Refusal
from pretrain.reasoning.compare_records import PuzzleRun

SIZES = ("model.width", "model.heads", "model.layers", "model.mlp_width", "model.mixing_width")
_APART = ("run", "layout", "checkpoint", "telemetry")
_TRAIN_APART = ("seed", "micro_batch", "device", "log_every", "nonfinite_limit", "peak_flops", "hang_timeout", "check_every")
_KEYS_APART = {
    *("data.path", "data.cache", "evaluation.batch", "solver.expected_iterations"),
    *(f"train.{key}" for key in _TRAIN_APART),
}
_SEED = re.compile(r"(?:^|[,_-])(?:(?:train\.)?seed[=_-]?\d+|s\d+)(?=$|[,_-])")
_LONGEST = 40


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe, by rising seed."""

    name: str
    runs: tuple[PuzzleRun, ...]

    @property
    def kind(self) -> str:
        return self.runs[0].recipe.model.kind

    @property
    def seeds(self) -> list[int]:
        return [run.recipe.train.seed for run in self.runs]

    @property
    def family(self) -> str:
        """What it has in common with arms of other sizes."""
        return json.dumps({key: value for key, value in settings(self.runs[0]).items() if key not in SIZES}, sort_keys=True)


def make_arms(runs: Sequence[PuzzleRun]) -> list[Arm]:
    """The arms, in the order of their first runs. Raises Refusal where two runs of one arm have the same seed."""
    groups: dict[str, list[PuzzleRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    ordered = [sorted(group, key=lambda run: run.recipe.train.seed) for group in groups.values()]
    for group in ordered:
        for run, after in pairwise(group):
            if run.recipe.train.seed == after.recipe.train.seed:
                raise Refusal(
                    f"{run.path} and {after.path} are the same run twice: same settings, same train.seed={run.recipe.train.seed}. Leave "
                    "one of them out: a spread over copies is none."
                )
    return [Arm(name, tuple(group)) for name, group in zip(_names(ordered), ordered, strict=True)]


def settings(run: PuzzleRun) -> dict[str, Any]:
    """What was trained, by dotted key."""
    body = run.recipe.model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, keys in body.items() if section not in _APART for key, value in keys.items()}
    return {"puzzles": run.training_sha256, **{key: value for key, value in flat.items() if key not in _KEYS_APART}}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of one value), least, most and number."""
    return {
        "mean": mean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def _names(groups: Sequence[Sequence[PuzzleRun]]) -> list[str]:
    common = [_common([_parts(run.path) for run in group]) for group in groups]
    for length in range(1, min(map(len, common)) + 1):
        names = ["/".join(parts[-length:]) for parts in common]
        if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST:
            return names
    told = [settings(group[0]) for group in groups]
    differ = [key for key in told[0] if any(other[key] != told[0][key] for other in told) and key != "puzzles"]
    names = [", ".join(f"{key.rpartition('.')[2]}={_word(own[key])}" for key in differ) for own in told]
    if len(set(names)) == len(names) and 0 < max(map(len, names)) <= _LONGEST:
        return names
    return [f"{group[0].recipe.model.kind} {number}" for number, group in enumerate(groups, 1)]


def _parts(path: Path) -> list[str]:
    """Of the whole path, seeds taken out; parts that were nothing else are left out."""
    return [part for part in (_SEED.sub("", part).strip(",_-") for part in path.resolve().parts[1:]) if part]


def _common(paths: Sequence[list[str]]) -> list[str]:
    """What all end in."""
    count = 0
    while count < min(map(len, paths)) and len({path[-1 - count] for path in paths}) == 1:
        count += 1
    return paths[0][len(paths[0]) - count :]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
