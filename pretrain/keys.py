"""The dotted keys of a recipe: which exist, what each wants, and which one a misspelt key most likely meant.

    LANGUAGE.keys["solver.tolerance"] -> float        LANGUAGE.nearest("solver.tolerence") -> "solver.tolerance"

A `Schema` is the keys of one regime: language models here, puzzles in pretrain/reasoning/config.py. Everything is read off the section
records, so that a new key needs no second mention.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.config import AttractorConfig, BackboneConfig, GradientConfig, LoopConfig, SolverConfig
from pretrain import sections
from pretrain.errors import Refusal

_BUDGETS = ("train.tokens", "train.steps")  # of language models, and of puzzles: each is what the other regime's user means


class Schema:
    """The sections of a regime's recipes and their keys."""

    def __init__(self, sections: Mapping[str, type], special: Mapping[str, str], budget: str) -> None:
        """special: what a key wants, where its type alone does not say it well. budget: the one key without a default."""
        self.sections = dict(sections)
        self.keys: dict[str, Any] = {
            f"{name}.{key}": annotation
            for name, section in self.sections.items()
            for key, annotation in get_type_hints(section).items()
            if key != "model_config"
        }
        """Every dotted key and its type, in order."""
        self.budget = budget
        self._special = dict(special)

    def nearest(self, dotted: str) -> str | None:
        """The existing key that a misspelt one most likely means, if any is near."""
        if dotted in _BUDGETS:
            return self.budget
        word = dotted.rpartition(".")[2]
        same_word = [key for key in self.keys if key.rpartition(".")[2] == word]
        if same_word:
            return max(same_word, key=lambda key: difflib.SequenceMatcher(None, dotted, key).ratio())
        if "." in dotted:
            return next(iter(difflib.get_close_matches(dotted, self.keys, n=1, cutoff=0.6)), None)
        words = {key.partition(".")[2]: key for key in reversed(self.keys)}
        return next((words[close] for close in difflib.get_close_matches(dotted, words, n=1, cutoff=0.7)), None)

    def wanted(self, dotted: str) -> str:
        """What the key takes, in the user's words."""
        return self._special.get(dotted) or _words(self.keys[dotted])

    def fit(self, dotted: str, value: Any) -> Any:
        """`2e9` is a whole number where one is wanted, and `123` a word; nothing else is converted."""
        annotation = self.keys[dotted]
        if isinstance(value, float) and value.is_integer() and _accepts(annotation, int) and not _accepts(annotation, float):
            return int(value)
        if type(value) in (int, float) and annotation is str:
            return str(value)
        return value

    def unknown(self, dotted: str, origin: str) -> Refusal:
        """The refusal of a key that does not exist, written in `origin`."""
        near = self.nearest(dotted)
        section = dotted.partition(".")[0]
        if near is not None:
            return Refusal(f"There is no key `{dotted}` (from {origin}). Did you mean `{near}`?")
        keys = [key for key in self.keys if key.startswith(f"{section}.")]
        choices = f"Keys of {section}: {', '.join(keys)}." if keys else f"Sections: {', '.join(self.sections)}."
        return Refusal(f"There is no key `{dotted}` (from {origin}). {choices}")


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    names = {int: "a whole number such as 8", float: "a number such as 3e-4", bool: "true or false", str: "a word", type(None): "null"}
    return names.get(annotation, "a list" if origin is list else str(annotation))


def _accepts(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_accepts(part, kind) for part in get_args(annotation))


LANGUAGE = Schema(
    {
        "run": sections.RunSection,
        "data": sections.DataSection,
        "model": BackboneConfig,
        "attractor": AttractorConfig,
        "solver": SolverConfig,
        "gradient": GradientConfig,
        "loop": LoopConfig,
        "train": sections.TrainSection,
        "optimizer": sections.OptimizerSection,
        "schedule": sections.ScheduleSection,
        "layout": sections.LayoutSection,
        "checkpoint": sections.CheckpointSection,
        "evaluation": sections.EvaluationSection,
        "telemetry": sections.TelemetrySection,
    },
    {
        "data.path": "the folder of a prepared set, or a list such as [{path: a, weight: 0.7}, {path: b, weight: 0.3}]",
        "evaluation.iterations": "a list of solver iterations such as [0, 1, 4, auto]",
        "optimizer.betas": "two numbers from 0 to below 1, such as [0.9, 0.95]",
        "train.tokens": "a number of tokens such as 2e9",
    },
    budget="train.tokens",
)
"""Of language models."""
