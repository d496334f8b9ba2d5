"""The arms of a study on so many GPUs: recipes, layouts, budgets, and what each costs. No torch.

    GPU hours at a stated MFU   model FLOPs / (MFU * peak of a GPU) / 3600
    GPU hours as modelled       steps * modelled seconds of a step (pretrain/scaling.py) * GPUs / 3600

A budget that is matched by FLOPs follows from a plan until the arm it follows from has finished, and from its ledger then;
`Arm.basis` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.plan import complete
from launchers.series import Member, finished, naming, override, refuse_own, started, summary
from launchers.study import Arm, Study, Times
from model.cost import Work, count_parameters
from pretrain.config import Recipe, load_recipe, stated
from pretrain.errors import Refusal
from pretrain.gpus import GPUS
from pretrain.layout import layout_on
from pretrain.ledger import peak_flops
from pretrain.matching import nearest_budget, run_flops, token_flops, tokens_for_flops, work_of
from pretrain.measured import measured
from pretrain.recommend import recommend
from pretrain.run_folder import CONFIG
from pretrain.scaling import estimate


@dataclass(frozen=True)
class Entry:
    """An arm, resolved: what would be trained, and where its budget comes from."""

    arm: Arm
    member: Member
    recipe: Recipe
    """Complete, with its budget."""
    basis: str
    layout: list[str]
    """Overrides that choose its layout."""

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def tokens(self) -> int:
        """That whole steps of the budget train on."""
        length = self.recipe.data.sequence_length or 0
        return self.recipe.steps(length) * self.recipe.train.global_batch * length


class Arms:
    """A study with the settings of one invocation: resolves arms as far as what has finished allows."""

    def __init__(self, study: Study, out: Path, gpus: int, overrides: Sequence[str]) -> None:
        """Raises Refusal for overrides that the study decides itself, and arms that no layout on `gpus` GPUs allows."""
        refuse_own(overrides)
        if "train.tokens" in stated(overrides):
            raise Refusal(
                "train.tokens is what a study is about: its arms set it. For other budgets, copy the study's file and change them there."
            )
        self.study, self.out, self.gpus, self.overrides = study, out, gpus, list(overrides)
        self._layouts: dict[str, list[str]] = {}

    def resolve(self) -> list[Entry]:
        """All arms, in the order of training. Raises Refusal for arms that cannot be compared, or trained on so many GPUs."""
        entries: list[Entry] = []
        for arm in self.study.order:
            entries.append(self._entry(arm, {entry.name: entry for entry in entries}))
        _refuse_other_data(entries)
        return entries

    def _entry(self, arm: Arm, earlier: dict[str, Entry]) -> Entry:
        model, run = self.study.models[arm.model], self.out / arm.name
        with naming(arm.name):
            layout = self._layout(arm.model)
            words = [*model.overrides, *layout, *self.overrides]
            recipe = complete(load_recipe(model.recipe, [*words, "train.tokens=1e18"]))  # its own budget, of any size, must not refuse it
            layout_on(recipe.layout, self.gpus)
            tokens, basis = self._budget(arm, recipe, run, earlier)
            words.append(override("train.tokens", tokens))
            return Entry(arm, Member(arm.name, model.recipe, tuple(words), run), _with_tokens(recipe, tokens), basis, layout)

    def _layout(self, name: str) -> list[str]:
        """The study's own layout of a model on these GPUs, or the recommended one."""
        if self.gpus in self.study.layouts:
            return self.study.layouts[self.gpus][name]
        if name not in self._layouts:
            model = self.study.models[name]
            recipe = complete(load_recipe(model.recipe, [*model.overrides, *self.overrides]))
            self._layouts[name] = recommend(recipe, self.gpus, GPUS[self.study.gpu])[0].overrides(recipe)
        return self._layouts[name]

    def _budget(self, arm: Arm, recipe: Recipe, run: Path, earlier: dict[str, Entry]) -> tuple[int, str]:
        """Tokens, and what they follow from."""
        if isinstance(arm.tokens, float):
            return int(arm.tokens), "stated"
        if isinstance(arm.tokens, Times):
            return nearest_budget(recipe, arm.tokens.times * earlier[arm.tokens.of].tokens), f"{arm.tokens.times:g} x {arm.tokens.of}"
        source = earlier[str(arm.waits_for)]
        known, work = finished(source.member.run), self._work(arm, recipe, earlier)
        spent = summary(source.member.run)["flops"]["model"] if known else run_flops(source.recipe, source.tokens)
        iterates = recipe.model.solves or recipe.model.loops
        basis = (
            f"{'measured' if known else 'planned'} FLOPs of {source.name}" + iterates * f", {'measured' if work else 'expected'} iterations"
        )
        tokens = tokens_for_flops(recipe, spent, work)
        if started(run):
            begun = Recipe.from_yaml((run / CONFIG).read_text(encoding="utf-8"), str(run / CONFIG)).train.tokens
            return (tokens, basis) if begun == tokens else (begun, "as it was started")
        return tokens, basis

    def _work(self, arm: Arm, recipe: Recipe, earlier: dict[str, Entry]) -> Work | None:
        """What a sequence took in a finished arm of the same model; None where there is none, or nothing iterates."""
        if not (recipe.model.solves or recipe.model.loops):
            return None
        done = [entry for entry in earlier.values() if entry.arm.model == arm.model and finished(entry.member.run)]
        return measured(done[-1].member.run).work if done else None


def _with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": tokens})})


def _refuse_other_data(entries: Sequence[Entry]) -> None:
    """Raises Refusal where arms do not read the same data, tokenised and cut alike."""

    def read(entry: Entry) -> dict[str, Any]:
        data = entry.recipe.data.model_dump(mode="json", exclude={"workers", "cache"})
        return {**{f"data.{key}": value for key, value in data.items()}, "model.vocabulary_size": entry.recipe.model.vocabulary_size}

    first = read(entries[0])
    for entry in entries[1:]:
        for key, value in read(entry).items():
            if value != first[key]:
                raise Refusal(
                    f"The arms {entries[0].name} and {entry.name} differ in {key}: {first[key]} and {value}. Losses compare on the same "
                    f"tokens alone: give all arms the same, for example as `{key}=...` after the study's name."
                )


def plan_row(entry: Entry, gpus: int, gpu: str, mfu: float) -> dict[str, Any]:
    """What an arm is and costs. FLOPs are of the whole run, at the recipe's expected iterations; times are of `gpus` GPUs."""
    recipe, counts = entry.recipe, count_parameters(entry.recipe.architecture)
    tokens, a_token = entry.tokens, token_flops(entry.recipe)
    peak = peak_flops(GPUS[gpu].name, recipe.train.precision) or 0.0
    said = estimate(recipe, layout_on(recipe.layout, gpus), GPUS[gpu])
    steps = recipe.steps(recipe.data.sequence_length or 0)
    hours, modelled = tokens * a_token.model / (mfu * peak) / 3600, steps * said.step * gpus / 3600
    solves = recipe.model.solves or recipe.model.loops
    work = work_of(recipe, None)
    return {
        "arm": entry.name,
        "recipe": entry.member.recipe,
        "overrides": list(entry.member.overrides),
        "run": str(entry.member.run),
        "parameters": {"total": counts.total, "matmul": counts.matmul},
        "tokens": tokens,
        "steps": steps,
        "tokens_per_parameter": tokens / counts.total,
        "tokens_from": entry.basis,
        "iterations": work.evaluations + (work.applications if recipe.model.loops else 0) if solves else None,
        "flops": {"model": tokens * a_token.model, "hardware": tokens * a_token.hardware},
        "gpu_hours": {"at_mfu": hours, "modelled": modelled},
        "days": {"at_mfu": hours / gpus / 24, "modelled": modelled / gpus / 24},
        "step_seconds": said.step,
        "modelled_mfu": said.mfu,
        "layout": entry.layout,
    }
