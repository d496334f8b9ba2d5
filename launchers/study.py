"""A study: arms to train, how their budgets follow from each other, and what they are asked. YAML under launchers/studies. No torch.

    tokens: 61.6e9                       a number
    tokens: {times: 2, of: attractor-N}  a multiple of another arm's tokens
    tokens: {flops_of: attractor-N}      as many as cost the model FLOPs of that arm (pretrain/matching.py)

A FLOP-matched budget is planned with the recipes' expected iterations, and set, once the arm it is matched to has finished, by that
arm's measured FLOPs and by the work a sequence that a finished arm of the same model was measured to take. What an arm was
started with stays. Refused: unknown studies, models and arms, budgets that depend on themselves, arms that read different data.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from pretrain.errors import Refusal
from pretrain.overrides import parse_yaml
from pretrain.sections import Section

STUDIES = Path(__file__).resolve().parent / "studies"


class Prepared(Section):
    """The data of all arms: how `attractor data prepare` makes it."""

    sources: Annotated[list[str], Field(min_length=1)]
    vocabulary_size: int
    sequence_length: int
    validation: float
    """Held-out share of the documents."""
    prepare: bool
    """Whether the study prepares it by itself where data.path is not given."""


class Model(Section):
    """What several arms train."""

    recipe: str
    overrides: list[str]


class Times(Section):
    times: Annotated[float, Field(gt=0)]
    of: str


class FlopsOf(Section):
    flops_of: str


class Arm(Section):
    """One run. `tokens`: see the head of this file."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    model: str
    tokens: Annotated[float, Field(gt=0)] | Times | FlopsOf

    @property
    def source(self) -> str | None:
        """The arm its budget follows from."""
        return self.tokens.of if isinstance(self.tokens, Times) else self.waits_for

    @property
    def waits_for(self) -> str | None:
        """The arm whose measured FLOPs set its budget."""
        return self.tokens.flops_of if isinstance(self.tokens, FlopsOf) else None


class Evaluation(Section):
    depths: Annotated[list[Annotated[int, Field(ge=0)] | Literal["auto", "strict"]], Field(min_length=1)]
    """Solver iterations at which every arm is evaluated, on the whole validation split."""
    tasks: list[Literal["validation", "core"]]


class Question(Section):
    """Whether the first arm's loss is the lower one."""

    asks: str
    arms: Annotated[list[str], Field(min_length=2, max_length=2)]


class Study(Section):
    """A whole study, as its file says it."""

    asks: str
    gpu: Literal["h100", "h200"]
    mfu: Annotated[float, Field(gt=0, lt=1)]
    """At which `--plan` counts GPU hours, beside the model of step time."""
    data: Prepared
    models: dict[str, Model]
    arms: Annotated[list[Arm], Field(min_length=2)]
    layouts: dict[int, dict[str, list[str]]]
    """Overrides by number of GPUs and model."""
    evaluation: Evaluation
    questions: list[Question]

    @model_validator(mode="after")
    def _names(self) -> Study:
        names = [arm.name for arm in self.arms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"There are two arms named {twice}: give each its own name.")
        for arm in self.arms:
            _known(arm.model, list(self.models), f"The arm {arm.name} trains the model")
            if arm.source is not None:
                _known(arm.source, names, f"The tokens of the arm {arm.name} follow from the arm")
        for question in self.questions:
            for name in question.arms:
                _known(name, names, f"The question {question.asks!r} names the arm")
        for gpus, layout in self.layouts.items():
            if layout.keys() != self.models.keys():
                raise ValueError(
                    f"layouts.{gpus} must give overrides, or [], for each of {', '.join(self.models)}, not for {', '.join(layout)}."
                )
        by_name = {arm.name: arm for arm in self.order}
        for arm in self.arms:
            if isinstance(arm.tokens, Times) and by_name[arm.tokens.of].source is not None:
                raise ValueError(
                    f"The tokens of {arm.name} are a multiple of those of {arm.tokens.of}, which follow from another arm: name an arm "
                    "whose tokens are a number."
                )
        return self

    @property
    def order(self) -> list[Arm]:
        """The arms, each after the one its budget follows from; otherwise as listed. Raises ValueError for a circle."""
        by_name = {arm.name: arm for arm in self.arms}
        ordered: list[Arm] = []
        for arm in self.arms:
            chain = [arm]
            while (source := chain[-1].source) is not None and by_name[source] not in ordered:
                if by_name[source] in chain:
                    circle = " -> ".join(link.name for link in (*chain, by_name[source]))
                    raise ValueError(f"The tokens of an arm follow from its own: {circle}. Give one of these a number.")
                chain.append(by_name[source])
            ordered += [link for link in reversed(chain) if link not in ordered]
        return ordered


def _known(name: str, names: Sequence[str], what: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise ValueError(
            f"{what} {name}, which there is not. {f'Did you mean {close[0]}?' if close else 'There are ' + ', '.join(names) + '.'}"
        )


def study_names() -> list[str]:
    """Names of the studies that ship with the project."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name_or_path: str) -> tuple[str, Study]:
    """The name and the study of that name or file. Raises Refusal for one that there is not, or whose file is not as it must be."""
    file = Path(name_or_path)
    if "/" not in name_or_path and file.suffix not in (".yaml", ".yml"):
        file = STUDIES / f"{name_or_path}.yaml"
        if not file.is_file():
            close = difflib.get_close_matches(name_or_path, study_names(), n=1, cutoff=0.3)
            hint = f"Did you mean `{close[0]}`?" if close else f"Studies: {', '.join(study_names())}."
            raise Refusal(f"There is no study named `{name_or_path}`. {hint} Give a file of your own by its path: ./{name_or_path}.yaml.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            f"The study {file} cannot be read: {error}. Studies that ship with the project: {', '.join(study_names())}."
        ) from error
    try:
        return file.stem, Study.model_validate_json(json.dumps(parse_yaml(text, str(file))), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else f"{where}: {first['msg']}."
        if "tokens" in first["loc"]:  # of three forms; what is wrong with each would say less
            said = f"{where.partition('.tokens')[0]}.tokens must be a number above 0, {{times: 2, of: ARM}} or {{flops_of: ARM}}."
        raise Refusal(f"{said} (In the study {file}; launchers/studies/mini.yaml is one to start from.)") from error
