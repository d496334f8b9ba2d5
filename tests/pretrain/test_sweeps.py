"""Recipes that are sweeps: the members they make, and what is refused of them, by name or as a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.config import load_recipe, recipe_names, stated, sweep_names, sweep_of
from pretrain.errors import Refusal
from pretrain.keys import LANGUAGE
from pretrain.sweeps import parse_sweep


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_mapping_is_a_product_with_the_last_key_fastest() -> None:
    members = parse_sweep({"attractor.injection": ["additive", "concat"], "train.tokens": [1e6, 2e6]}, "here", LANGUAGE)
    assert members == [
        {"attractor.injection": injection, "train.tokens": tokens} for injection in ("additive", "concat") for tokens in (10**6, 2 * 10**6)
    ]
    assert all(type(member["train.tokens"]) is int for member in members), "2e6 is a whole number where one is wanted"


def test_a_list_is_the_members_themselves() -> None:
    members = [{"attractor.layers": 1, "model.backbone_layers": 3}, {"attractor.layers": 2, "model.backbone_layers": 2}]
    assert parse_sweep(members, "here", LANGUAGE) == members


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "must be keys with lists"),
        ([], "must be keys with lists"),
        ({}, "must be keys with lists"),
        ([{"solver.tolerance": 1e-2}, "x"], "must be keys with lists"),
        ({"solver.tolerance": 1e-2}, "no list of values"),
        ({"solver.tolerance": []}, "no list of values"),
        ({"solver.tolerence": [1, 2]}, "Did you mean `solver.tolerance`"),
        ({"run.dir": ["a", "b"]}, "every member is given by itself"),
        ({"solver.tolerance": [1e-2, 0.01]}, "twice"),
        ([{"attractor.layers": 1}, {"model.width": 64}], "must set the same keys"),
    ],
)
def test_refusals_name_the_place_and_the_fault(value: object, said: str) -> None:
    with pytest.raises(Refusal, match=re.escape(said)) as refused:
        parse_sweep(value, "the recipe 'mine'", LANGUAGE)
    assert "mine" in str(refused.value)


@pytest.mark.parametrize("name", sweep_names())
def test_every_member_of_the_shipped_sweeps_is_a_recipe(name: str) -> None:
    members = sweep_of(name)
    recipes = [load_recipe(name, [f"{key}={value}" for key, value in member.items()]) for member in members]
    assert len(recipes) >= 3
    assert len({recipe.to_yaml() for recipe in recipes}) == len(recipes)
    if name == "ablation-blocks":
        assert len({recipe.attractor.layers + recipe.model.backbone_layers for recipe in recipes}) == 1


def test_sweeps_are_no_recipes_of_one_run(tmp_path: Path) -> None:
    assert not set(sweep_names()) & set(recipe_names())
    assert set(sweep_names()) == {f"ablation-{what}" for what in ("injection", "start", "gradient", "blocks", "tolerance")}
    assert not any(sweep_of(name) for name in recipe_names())
    with pytest.raises(Refusal, match=r"`attractor sweep ablation-injection` runs them all.*attractor.injection=\"init_only\""):
        load_recipe("ablation-injection")
    with pytest.raises(Refusal, match=r"say which: model.backbone_layers=3\."):
        load_recipe("ablation-blocks", ["attractor.layers=1"])
    with pytest.raises(Refusal, match="cannot be the base"):
        load_recipe(write(tmp_path, "base: ablation-injection\n"))
    with pytest.raises(Refusal, match="Did you mean `ablation-blocks`"):
        load_recipe("ablation-block")


def test_a_section_at_once_states_its_keys(tmp_path: Path) -> None:
    assert stated(["solver={tolerance: 1e-2, history: 3}", "train.tokens=1"]) == {"solver.tolerance", "solver.history", "train.tokens"}
    mine = write(tmp_path, "base: demo\nsweep:\n  solver.tolerance: [1e-1, 1e-2]\n")
    assert load_recipe(mine, ["solver={tolerance: 3e-2}"]).solver.tolerance == 3e-2
