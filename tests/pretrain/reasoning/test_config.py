"""Recipes of puzzles: read as those of language models are, with keys of their own, and kept apart from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import PuzzleRecipe, Recipe, load_any, load_recipe, read_recipe
from pretrain.errors import Refusal
from pretrain.schedule import learning_rate_scale

BODY = "regime: reasoning\ntrain: {steps: 4_000, global_batch: 32, micro_batch: 16}\nmodel: {kind: attractor, width: 64, heads: 4}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(BODY)
    return str(file)


def load(name: str, *overrides: str) -> PuzzleRecipe:
    found = load_any(name, overrides)
    assert isinstance(found, PuzzleRecipe)
    return found


def test_layers_overrides_and_back(recipe: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: ./mine.yaml\nsupervision: {steps: 8}\n")
    found = load(str(child), "model.outer_cycles=2", "gradient={mode: phantom, steps: 2}")
    assert (found.model.kind, found.model.outer_cycles, found.supervision.steps, found.gradient.steps) == ("attractor", 2, 8, 2)
    assert found.run.dir == "runs/child"
    assert found.check_world(2) == 1
    assert read_recipe(found.to_yaml()) == found
    assert found.to_yaml().startswith("regime: reasoning\n")


def test_what_the_puzzles_decide(recipe: str) -> None:
    whole = load(recipe).completed(6, 16, 1, "data/x")
    assert (whole.model.vocabulary_size, whole.cells) == (6, 16)
    with pytest.raises(Refusal, match=r"model\.cells=81 is not that of the puzzles in data/x, which is 16"):
        load(recipe, "model.cells=81").completed(6, 16, 1, "data/x")
    with pytest.raises(Refusal, match=r"model\.identifiers=1 is less than the 3"):
        load(recipe).completed(6, 16, 3, "data/x")


def test_the_schedule_counts_steps(recipe: str) -> None:
    schedule = load(recipe, "schedule.warmup_steps=1000").learning_rate_schedule
    assert (schedule.shape, schedule.warmup) == ("constant", 0.25)
    longer = load(recipe, "schedule.warmup_steps=8000").learning_rate_schedule
    assert learning_rate_scale(2000, longer, 4000) == 0.25, "at step 2,000 of a warm-up of 8,000, in a run of 4,000"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.kindd=trm", "Did you mean `model.kind`?"),
        ("train.tokens=1e6", "There is no key `train.tokens` (from the override `train.tokens=1e6`). Did you mean `train.steps`?"),
        ("layout.tensor=2", "data parallel"),
        ("layout.zero=2", "data parallel"),
        ("layout.zero=0", "train.precision=bf16 with layout.zero=0"),
        ("evaluation.steps=[4, 1]", "must rise"),
        ("train.micro_batch=5", "does not divide"),
        ("train.steps=many", "expected a number of optimizer steps"),
        ("supervision.steps=0", "supervision.steps"),
        ("model.kind=transformer", "supervision.steps=16 is for models that carry latents"),
        ("gradient.mode=adjoint", "gradient.mode=adjoint is for language models"),
        ("solver.start=noise", "solver.start=noise: a reasoner's solve starts at the latents of the step before"),
    ],
)
def test_refusals(recipe: str, override: str, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        load_any(recipe, [override])
    assert said in str(refused.value)


def test_a_budget_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    file.write_text("regime: reasoning\n")
    with pytest.raises(Refusal, match=r"train\.steps is missing"):
        load_any(str(file))


def test_the_regimes_are_kept_apart(recipe: str, tmp_path: Path) -> None:
    for read in (lambda: load_recipe(recipe), lambda: Recipe.from_yaml(load(recipe).to_yaml(), "runs/x/config.yaml")):
        with pytest.raises(Refusal, match="of puzzles"):
            read()
    with pytest.raises(Refusal, match=r"^runs/x/config\.yaml is of puzzles"):
        Recipe.from_yaml(load(recipe).to_yaml(), "runs/x/config.yaml")
    with pytest.raises(Refusal, match=r"^The recipe .* is of puzzles"):
        load_recipe(recipe)
    text = "base: demo\nregime: reasoning\n"
    file = tmp_path / "mixed.yaml"
    file.write_text(text)
    with pytest.raises(Refusal, match="choose another base"):
        load_any(str(file))
    file.write_text("regime: resoning\n")
    with pytest.raises(Refusal, match="Did you mean reasoning"):
        load_any(str(file))


def test_a_language_recipe_stays_one() -> None:
    found = load_any("demo")
    assert isinstance(found, Recipe)
    assert read_recipe(found.to_yaml()) == found
