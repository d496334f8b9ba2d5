"""Every named recipe builds, and has the parameters of the published table (rounded there to a million)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from model.cost import count_parameters
from model.language_model import build
from pretrain.config import KEYS, Recipe, load_recipe, recipe_names

VOCABULARY = 32768

PUBLISHED = {
    # name: (total, in matrix products of blocks, value-embedding tables), millions, as published and computed from the configurations
    "attractor-60m": (60.3, None, 0),
    "attractor-140m": (134, 101, 0),
    "attractor-770m": (769, 727, 0),
    "transformer-140m": (143, 42, 75),
    "transformer-770m": (773, 354, 378),
    "transformer-1.3b": (1334, 680, 604),
    "parcae-770m": (777, 354, 378),
}

BY_HAND = {
    # name: (width, blocks, value-embedding tables): not in the published table, so computed here from its configurations
    "attractor-370m": (1280, 15 + 2, 0),
    "attractor-1.3b": (1536, 23 + 3, 0),
    "transformer-370m": (1024, 12, 6),
    "parcae-140m": (768, 2 + 2 + 2, 3),
    "parcae-370m": (1024, 4 + 4 + 4, 6),
    "parcae-1.3b": (1536, 8 + 8 + 8, 12),
}

OURS = {
    # name: (least, most) parameters, millions: what two CPU cores can train
    "demo": (0.5, 3),
    "demo-transformer": (0.5, 3),
    "edu-1m": (1.2, 1.4),
    "edu-1m-transformer": (1.2, 1.4),
    "edu-1m-parcae": (1.2, 1.4),
    "edu-1m-looped": (1.2, 1.4),
    "edu-1m-deq": (1.7, 1.9),
    "edu-1m-deq-tied": (1.2, 1.4),
    "edu-5m": (4.5, 5.5),
    "edu-5m-transformer": (4.5, 5.5),
}


def built(name: str) -> tuple[Recipe, int]:
    """The recipe and the parameters of its model, built on the meta device (shared ones counted once)."""
    recipe = load_recipe(name)
    network = build(recipe.architecture, device="meta")
    return recipe, sum(parameter.numel() for parameter in network.parameters())


def near(count: int, millions: float) -> bool:
    """Within 1 %, or within the rounding of a figure given in millions."""
    return abs(count - millions * 1e6) <= max(0.01 * millions, 0.5) * 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    recipe, parameters = built(name)
    total, matmul, tables = PUBLISHED[name]
    counted = count_parameters(recipe.architecture)
    assert abs(parameters - total * 1e6) <= 0.01 * total * 1e6
    assert counted.total == parameters
    assert matmul is None or near(counted.matmul, matmul)
    assert near(counted.value_embedding, tables)


@pytest.mark.parametrize("name", BY_HAND)
def test_sizes_computed_by_hand(name: str) -> None:
    recipe, parameters = built(name)
    width, blocks, tables = BY_HAND[name]
    block = 4 * width**2 + 2 * width * 4 * width  # q, k, v, output; up and down of an MLP four times as wide
    expected = VOCABULARY * width * (1 + tables) + blocks * block
    assert abs(parameters - expected) <= 0.01 * expected
    assert count_parameters(recipe.architecture).total == parameters


@pytest.mark.parametrize(("name", "width", "blocks"), [("140m", 768, 6), ("370m", 1024, 12), ("770m", 1280, 18), ("1.3b", 1536, 24)])
def test_a_transformer_without_value_embeddings_is_its_table_and_its_blocks(name: str, width: int, blocks: int) -> None:
    recipe = load_recipe(f"transformer-{name}", ["model.value_embeddings=false"])
    parameters = sum(parameter.numel() for parameter in build(recipe.architecture, device="meta").parameters())
    assert parameters == VOCABULARY * width + blocks * (12 * width**2 + 2 * width) + width
    assert count_parameters(recipe.architecture).total == parameters


def test_every_shipped_recipe_is_covered() -> None:
    assert set(recipe_names()) == {*PUBLISHED, *BY_HAND, *OURS}


@pytest.mark.parametrize("name", OURS)
def test_our_own_are_as_small_as_they_say(name: str) -> None:
    _, parameters = built(name)
    least, most = OURS[name]
    assert least * 1e6 < parameters < most * 1e6


def test_demo_transformer_has_the_demo_s_backbone() -> None:
    attractor, transformer = load_recipe("demo"), load_recipe("demo-transformer")
    assert transformer.model.kind == "transformer"
    assert (transformer.model.width, transformer.model.backbone_layers) == (attractor.model.width, attractor.model.backbone_layers)
    assert (transformer.train, transformer.data) == (attractor.train, attractor.data)


@pytest.mark.parametrize("name", recipe_names())
def test_published_settings_are_kept(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    if name in OURS:
        return
    assert recipe.train.global_batch * (recipe.data.sequence_length or 0) == 256 * 2048
    assert recipe.model.vocabulary_size == VOCABULARY
    assert recipe.model.head_dim == 128
    assert recipe.model.value_embeddings == name.startswith(("transformer", "parcae"))
    assert (recipe.schedule.shape, recipe.schedule.warmup, recipe.schedule.decay, recipe.schedule.final) == ("trapezoid", 0, 0.5, 0)
    assert (recipe.optimizer.name, recipe.optimizer.betas, recipe.optimizer.eps) == ("muon", [0.8, 0.95], 1e-10)


def test_the_page_lists_every_key_with_its_default_and_meaning() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    page = page.partition("## Every key")[2]
    rows = {key: default for key, default in re.findall(r"^\| `(\w+\.\w+)` \| (.*?) \| .+ \|$", page, re.MULTILINE)}
    assert set(KEYS) - set(rows) == set(), "keys without a row"
    assert set(rows) - set(KEYS) == set(), "rows without a key"
    assert list(rows) == list(KEYS), "rows in another order than the fields"
    sections = Recipe.model_validate_json('{"train": {"tokens": 1000000}}').model_dump(mode="json")
    for key in KEYS:
        section, _, name = key.partition(".")
        if key not in ("train.tokens", "run.name", "run.dir"):
            assert rows[key] == json.dumps(sections[section][name]).replace('"', ""), key


def test_the_page_names_every_recipe() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert not [name for name in recipe_names() if name not in page]
