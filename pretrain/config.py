"""Recipes: everything a run depends on, as fourteen sections of strictly typed keys. Starts without torch.

A recipe is YAML under launchers/recipes (or any file), changed by `section.key=value` overrides:

    layers of YAML (base: first) -> overrides -> one tree of plain values -> Recipe (frozen) -> config.yaml of the run

Refused, each with the key, where it was written and the remedy: keys that do not exist (the nearest name is offered),
values of another type, numbers out of range, and combinations that no run could honour. Checks that need files or
ranks come later: `Recipe.sources`, `Recipe.check_world`. The sections `model`, `attractor`, `solver`, `gradient`
and `loop` are the records of model/config.py, defaults included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from model.config import AttractorConfig, BackboneConfig, GradientConfig, LoopConfig, ModelConfig, SolverConfig
from pretrain.draft import Draft, accumulation
from pretrain.errors import Refusal
from pretrain.keys import LANGUAGE
from pretrain.layout import refuse_illegal
from pretrain.overrides import parse_override, parse_yaml
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.reasoning.sections import REASONING
from pretrain.recipe_files import (
    LANGUAGE_REGIME,
    REASONING_REGIME,
    RECIPES,
    layers,
    mapping,
    recipe_file,
    recipe_names,
    regime_of,
    sweep_names,
    sweep_of,
)
from pretrain.sections import (
    CheckpointSection,
    DataSection,
    EvaluationSection,
    LayoutSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    Section,
    TelemetrySection,
    TrainSection,
)
from pretrain.sweeps import Settings

KEYS = LANGUAGE.keys

__all__ = [
    "KEYS",
    "RECIPES",
    "AnyRecipe",
    "PuzzleRecipe",
    "Recipe",
    "load_any",
    "load_recipe",
    "read_recipe",
    "recipe_names",
    "stated",
    "sweep_names",
    "sweep_of",
]


class Recipe(Section):
    """A whole run, resolved and checked. Made by `load_recipe`, stored as config.yaml, read back by `from_yaml`."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: BackboneConfig = BackboneConfig()
    attractor: AttractorConfig = AttractorConfig()
    solver: SolverConfig = SolverConfig()
    gradient: GradientConfig = GradientConfig()
    loop: LoopConfig = LoopConfig()
    train: TrainSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    layout: LayoutSection = LayoutSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    telemetry: TelemetrySection = TelemetrySection()

    @property
    def architecture(self) -> ModelConfig:
        """The five sections `model.build` takes."""
        return ModelConfig(self.model, self.attractor, self.solver, self.gradient, self.loop)

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path or URL, weight) of every prepared set. Raises Refusal when the recipe names none."""
        if self.data.path is None:
            raise Refusal(
                f"data.path is missing in the recipe {self.run.name!r}: prepare text with `attractor data prepare SOURCE --out DIR`, "
                "then add data.path=DIR."
            )
        if isinstance(self.data.path, str):
            return [(self.data.path, 1.0)]
        return [(member.path, member.weight) for member in self.data.path]

    def completed(self, vocabulary_size: int, sequence_length: int, path: str) -> Recipe:
        """The recipe with what it left open taken from the data prepared at `path`: its sequence length, and an embedding for its
        tokenizer's vocabulary (rounded up to a multiple of 64).

        Raises Refusal when the stated embedding is smaller than that vocabulary, or the budget less than a step.
        """
        rows = self.model.vocabulary_size
        if rows is not None and rows < vocabulary_size:
            raise Refusal(
                f"model.vocabulary_size={rows} is smaller than the {vocabulary_size} entries of the tokenizer of {path}: leave it out, "
                f"set it to {vocabulary_size} or more, or prepare the data with --vocab-size {rows}."
            )
        model = replace(self.model, vocabulary_size=-(-vocabulary_size // 64) * 64 if rows is None else rows)
        length = self.data.sequence_length or sequence_length
        data = self.data.model_copy(update={"sequence_length": length})
        try:
            # what was open when the recipe was read is known now
            refuse_illegal(self.layout, replace(self.architecture, model=model), length)
        except ValueError as error:
            raise Refusal(f"{error} (With the data prepared at {path}.)") from error
        complete = self.model_copy(update={"model": model, "data": data})
        complete.steps(length)
        return complete

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps that the token budget pays for. Raises Refusal when it pays for none."""
        tokens = self.train.global_batch * sequence_length
        if self.train.tokens < tokens:
            raise Refusal(
                f"train.tokens={self.train.tokens} is less than one step of train.global_batch={self.train.global_batch} sequences "
                f"of {sequence_length} tokens ({tokens}): raise the budget or lower the batch."
            )
        return self.train.tokens // tokens

    def check_world(self, data_ranks: int) -> int:
        """Accumulation: micro-batches a rank takes in each step. Raises Refusal that names legal neighbours when it is not whole."""
        return accumulation(self.train, data_ranks)

    def to_yaml(self) -> str:
        """The fully resolved recipe: every section, every key, in order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, source: str = "the stored recipe") -> Recipe:
        """Reads `to_yaml` back; `source` is what errors call it. Raises Refusal for a recipe of another regime."""
        recipe = read_recipe(text, source)
        if isinstance(recipe, PuzzleRecipe):
            raise _wrong_regime(source)
        return recipe

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        refuse_illegal(self.layout, self.architecture, self.data.sequence_length)
        if self.layout.tensor > 1 and self.gradient.jacobian_penalty:
            raise ValueError(
                "gradient.jacobian_penalty cannot be combined with layout.tensor above 1: it is differentiated twice, and collectives "
                "are differentiable once. Use layout.tensor=1, or gradient.convergence_penalty."
            )
        if self.train.precision == "bf16" and self.layout.zero == 0:
            raise ValueError(
                "train.precision=bf16 with layout.zero=0 is refused: there DeepSpeed accumulates and reduces gradients in bf16, which "
                "moves the weights 3e-3 off in five steps. Use layout.zero=1, which costs nothing on one rank, or train.precision=fp32."
            )
        if self.schedule.shape == "trapezoid" and self.schedule.warmup + self.schedule.decay > 1:
            raise ValueError(
                f"schedule.warmup={self.schedule.warmup} and schedule.decay={self.schedule.decay} together exceed the whole run: "
                "the two shares may add up to 1 at most."
            )
        if self.train.compile and self.layout.zero == 3 and self.model.loops:
            raise ValueError(
                "train.compile=true cannot be combined with layout.zero=3 for a model that loops: ranks whose sequences loop differently "
                "often then gather parameters differently often, and wait for each other without end (seen with DeepSpeed 0.19.8). Use "
                "layout.zero=1 or 2, or train.compile=false."
            )
        if self.train.compile and self.gradient.jacobian_penalty:
            raise ValueError(
                "train.compile=true cannot be combined with gradient.jacobian_penalty: the penalty is differentiated twice, which "
                "torch.compile does not support. Leave one of them out."
            )
        self.check_world(1)
        if self.data.sequence_length is not None:
            self.steps(self.data.sequence_length)
        return self


AnyRecipe = Recipe | PuzzleRecipe
"""Of either regime."""


def read_recipe(text: str, source: str = "the stored recipe") -> AnyRecipe:
    """A stored recipe of either regime, as its `to_yaml` wrote it; `source` is what errors call it. Raises Refusal."""
    body = dict(mapping(parse_yaml(text, source), source))
    return _checked(str(body.pop("regime", LANGUAGE_REGIME)), [(source, body)], source)


def _checked(regime: str, layers: Iterable[tuple[str, Mapping[str, Any]]], source: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    puzzles = regime == REASONING_REGIME
    draft = Draft(REASONING if puzzles else LANGUAGE)
    for origin, layer in layers:
        draft.add(layer, origin)
    for text in overrides:
        dotted, value = parse_override(text)
        draft.put(dotted, value, f"the override `{text}`")
    return draft.checked(PuzzleRecipe, source) if puzzles else draft.checked(Recipe, source)


def _wrong_regime(source: str) -> Refusal:
    subject = f"T{source[1:]}" if source.startswith("the ") else source  # a path stays as it is
    return Refusal(
        f"{subject} is of puzzles (regime: reasoning), and this is for language models. Puzzles have `attractor data "
        f"prepare`, `plan`, `train`, `sweep`, `launch`, `checkpoint`, `evaluate`, `compare` and `bench reasoning`: docs/puzzles.md."
    )


def stated(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that overrides set, those of a whole section at once too. Raises Refusal for what is no override."""
    keys = set()
    for text in overrides:
        dotted, value = parse_override(text)
        keys |= {f"{dotted}.{key}" for key in value} if "." not in dotted and isinstance(value, Mapping) else {dotted}
    return keys


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a language model: see `load_any`. Raises Refusal for one of puzzles too."""
    recipe = load_any(name_or_path, overrides)
    if isinstance(recipe, PuzzleRecipe):
        raise _wrong_regime(f"the recipe {recipe.run.name!r}")
    return recipe


def load_any(name_or_path: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe of that name or file, of either regime, with `section.key=value` overrides on top.

    Raises Refusal for an unknown recipe, an unknown or misspelt key, a value of another type or range, a combination
    that no run could honour, and a sweep of which the overrides leave a key open.
    """
    name = recipe_file(name_or_path, Path.cwd()).name.removesuffix(".yml").removesuffix(".yaml")
    parts = [("the recipe's name", {"run": {"name": name}}), *layers(name_or_path, Path.cwd())]
    if members := sweep_of(name_or_path):
        _refuse_open(name_or_path, members, stated(overrides))
    source = f"the recipe {name!r}" + (f" with {' '.join(overrides)}" if overrides else "")
    return _checked(regime_of(name_or_path, Path.cwd()), parts, source, overrides)


def _refuse_open(name: str, members: list[Settings], given: set[str]) -> None:
    """Raises Refusal for a sweep that the keys given do not make one run of."""
    missing = [key for key in members[0] if key not in given]
    if missing:
        raise Refusal(
            f"The recipe {name} is a sweep of {len(members)} runs that differ in {', '.join(members[0])}: `attractor sweep {name}` runs "
            f"them all. For one of them, say which: {' '.join(f'{key}={json.dumps(members[0][key])}' for key in missing)}."
        )
