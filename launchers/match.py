"""Several recipes matched by one quantity, and how far apart that leaves the others. No torch.

    first recipe, at its own train.tokens = the reference
    tokens, flops     the others' budgets are solved for
    total, matmul     the others' shapes are solved for; their budgets stay

One comparison has four sizes, total parameters, parameters in matrix products, tokens and FLOPs, and no two models agree in
all of them; so all four are said, as ratios to the first recipe's too. Refused: recipes that differ in sequence length or
vocabulary, for then neither a token nor its loss means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launchers.plan import complete
from model.cost import Work, count_parameters
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.matching import match_shape, nearest_budget, token_flops, tokens_for_flops, work_of
from pretrain.measured import Measured

QUANTITIES = {
    "flops": "model FLOPs of the run",
    "tokens": "tokens",
    "total": "total parameters",
    "matmul": "parameters in matrix products of blocks",
}


@dataclass(frozen=True)
class Row:
    """One recipe as matched. FLOPs are training's; `model` is what the method needs, `hardware` adds what backward computes again."""

    recipe: str
    kind: str
    overrides: list[str]
    """What to add to the recipe to train it so: those given, then those solved for."""
    parameters: dict[str, int]
    iterations: float | None
    """Evaluations of f without gradient, or loops, a sequence; None for a model with neither."""
    work: dict[str, float]
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: dict[str, float]
    flops: dict[str, float]
    ratios: dict[str, float] = field(default_factory=dict)
    """`sizes` over the first recipe's."""

    @property
    def sizes(self) -> dict[str, float]:
        """What two recipes may agree in."""
        counts = {"total": self.parameters["total"], "matmul": self.parameters["matmul"], "tokens": self.tokens}
        return {**counts, "flops": self.flops["model"], "hardware": self.flops["hardware"]}


@dataclass(frozen=True)
class Match:
    """All that `attractor plan --match` says; the first row is the reference."""

    quantity: str
    sequence_length: int
    vocabulary_size: int
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of --json."""
        return asdict(self)


class Said:
    """What the command line says of iterations: numbers by recipe or kind, measured work by kind."""

    def __init__(self, stated: Sequence[str] = (), measured: Sequence[Measured] = ()) -> None:
        """stated: NAME=NUMBER, a recipe's or a kind's name. Raises Refusal for anything else, and for two that speak of one thing."""
        self._said: dict[str, float | Measured] = {}
        self._used: set[str] = set()
        for text in stated:
            name, _, number = text.partition("=")
            self._say(name, _positive(number, text), f"--iterations {text}")
        for run in measured:
            self._say(run.recipe.model.kind, run, f"--measured {run.run}")

    def _say(self, name: str, value: float | Measured, where: str) -> None:
        if name in self._said:
            raise Refusal(f"{where} speaks of {name!r} for the second time: leave one of --iterations and --measured out.")
        self._said[name] = value

    def of(self, word: str, recipe: Recipe) -> float | Work | None:
        """For one recipe, by what it was called, its name or its kind; None where nothing was said."""
        for name in (word, recipe.run.name, recipe.model.kind):
            if name not in self._said:
                continue
            if not (recipe.model.solves or recipe.model.loops):
                raise Refusal(f"{word} is a {recipe.model.kind}, which has no iterations: leave out --iterations {name}=...")
            self._used.add(name)
            value = self._said[name]
            return value.for_recipe(recipe) if isinstance(value, Measured) else value
        return None

    def refuse_unused(self, words: Sequence[str], recipes: Sequence[Recipe]) -> None:
        """Raises Refusal for a name that is none of the recipes' or their kinds'."""
        unused = [name for name in self._said if name not in self._used]
        if unused:
            kinds = sorted({recipe.model.kind for recipe in recipes if recipe.model.solves or recipe.model.loops})
            raise Refusal(
                f"Iterations were given for {', '.join(unused)}, which is neither one of the recipes {', '.join(words)} nor one of their "
                f"kinds ({', '.join(kinds) or 'none of which iterates'})."
            )


def _positive(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise Refusal(f"--iterations {text} must be RECIPE_OR_KIND=NUMBER with a number above 0, such as attractor=4.6.")
    return value


def make_match(quantity: str, words: Sequence[str], overrides: Sequence[str], iterations: Said) -> Match:
    """Matches the recipes named by `words` to the first of them. Raises Refusal where they cannot be compared or matched."""
    if quantity not in QUANTITIES:
        raise Refusal(f"--match {quantity} is not known: choose {', '.join(QUANTITIES)}.")
    if len(words) < 2:
        raise Refusal(
            f"--match {quantity} compares recipes, and {' '.join(words) or 'none'} was given: name two or more, the reference first."
        )
    recipes = [complete(load_recipe(word, overrides)) for word in words]
    refuse_incomparable(words, recipes)
    work = [work_of(recipe, iterations.of(word, recipe)) for word, recipe in zip(words, recipes, strict=True)]
    iterations.refuse_unused(words, recipes)
    first = _row(words[0], recipes[0], work[0], list(overrides), _trained(recipes[0]))
    rows = [first]
    for word, recipe, its in zip(words[1:], recipes[1:], work[1:], strict=True):
        matched, solved, tokens = _solve(quantity, recipe, its, first)
        rows.append(_row(word, matched, its, [*_without(overrides, solved), *solved], tokens, first))
    return Match(quantity, _length(recipes[0]), recipes[0].model.vocabulary_size or 0, rows)


def _solve(quantity: str, recipe: Recipe, work: Work, first: Row) -> tuple[Recipe, list[str], int]:
    """The recipe matched to the first, the overrides that do it, and its tokens."""
    own = _trained(recipe)
    if quantity in ("total", "matmul"):
        shape = match_shape(recipe, quantity, first.parameters[quantity])
        return shape.recipe, shape.overrides, own
    wanted = nearest_budget(recipe, first.tokens) if quantity == "tokens" else tokens_for_flops(recipe, first.flops["model"], work)
    return recipe, [f"train.tokens={wanted}"] * (wanted != own), wanted


def _row(word: str, recipe: Recipe, work: Work, overrides: list[str], tokens: int, first: Row | None = None) -> Row:
    parameters = asdict(count_parameters(recipe.architecture))
    token = token_flops(recipe, work)
    iterates = recipe.model.solves or recipe.model.loops
    row = Row(
        recipe=word,
        kind=recipe.model.kind,
        overrides=overrides,
        parameters=parameters,
        iterations=(work.evaluations + (work.applications if recipe.model.loops else 0)) if iterates else None,
        work=asdict(work),
        steps=tokens // (recipe.train.global_batch * _length(recipe)),
        tokens=tokens,
        tokens_per_parameter=tokens / parameters["total"],
        flops_per_token={"model": token.model, "hardware": token.hardware},
        flops={"model": tokens * token.model, "hardware": tokens * token.hardware},
    )
    return replace(row, ratios={name: size / (first or row).sizes[name] for name, size in row.sizes.items()})


def refuse_incomparable(words: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Raises Refusal where two complete recipes differ in sequence length or vocabulary."""
    sizes = {
        "data.sequence_length": [recipe.data.sequence_length for recipe in recipes],
        "model.vocabulary_size": [recipe.model.vocabulary_size for recipe in recipes],
    }
    for key, values in sizes.items():
        if len(set(values)) > 1:
            said = ", ".join(f"{word} {value}" for word, value in zip(words, values, strict=True))
            raise Refusal(
                f"The recipes differ in {key} ({said}), so neither a token nor its loss means the same in them. Give all of them one "
                f"value: an override such as {key}={values[0]} applies to every recipe."
            )


def _without(overrides: Sequence[str], solved: Sequence[str]) -> list[str]:
    """The overrides given, less those that were solved for."""
    keys = {text.partition("=")[0] for text in solved}
    return [text for text in overrides if text.partition("=")[0].strip() not in keys]


def _trained(recipe: Recipe) -> int:
    """Tokens that a run of the recipe sees: whole steps within its budget."""
    return recipe.steps(_length(recipe)) * recipe.train.global_batch * _length(recipe)


def _length(recipe: Recipe) -> int:
    assert recipe.data.sequence_length is not None  # `complete` saw to it
    return recipe.data.sequence_length
