"""Every named recipe builds, and has the parameters of the published table (rounded there to a million)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from model.cost import count_parameters
from model.language_model import build
from model.reasoning.cost import count_reasoner
from model.reasoning.reasoner import build as build_reasoner
from pretrain.config import KEYS, PuzzleRecipe, Recipe, load_any, load_recipe, read_recipe, recipe_names

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

REASONERS = {
    # name: (parameters of the blocks by hand, steps, global batch), the latter two as published; width 512, SwiGLU of 1,536
    "trm-7m": (2 * (4 * 512**2 + 3 * 512 * 1536), 65_104, 768),
    "trm-27m": (8 * (4 * 512**2 + 3 * 512 * 1536), 65_104, 768),
    "hrm-27m": (8 * (4 * 512**2 + 3 * 512 * 1536), 26_041, 768),
    "transformer-27m": (8 * (4 * 512**2 + 3 * 512 * 1536), 26_041, 768),
    "trm-mlp-5m": (2 * (3 * 97 * 512 + 3 * 512 * 1536), 65_104, 768),
    "equilibrium-5m": (2 * (3 * 81 * 256 + 3 * 512 * 1536), 65_104, 768),
}
SUDOKU6 = dict.fromkeys(("sudoku6-trm", "sudoku6-hrm", "sudoku6-transformer", "sudoku6-attractor"), 64_578)
"""The arms of docs/results.md and their parameters on 6x6 grids: HRM halves the blocks of its two networks."""

ATTRACTORS = {"sudoku": (130_208, 384), "maze": (390_625, 128)}
BOARDS = {"sudoku": (11, 81), "maze": (6, 900)}


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
    assert set(recipe_names("language")) == {*PUBLISHED, *BY_HAND, *OURS}
    both = ("trm-7m", "trm-27m", "hrm-27m", "transformer-27m", "attractor-7m", "attractor-27m", "demo")
    reasoners = {f"{game}-{name}" for game in BOARDS for name in both} | {"sudoku-trm-mlp-5m", "sudoku-equilibrium-5m"}
    assert set(recipe_names("reasoning")) == reasoners | set(SUDOKU6)


def reasoner(name: str) -> PuzzleRecipe:
    """The recipe, with the board that it is for."""
    vocabulary, cells = BOARDS[name.partition("-")[0]]
    recipe = load_any(name, [f"model.vocabulary_size={vocabulary}", f"model.cells={cells}"])
    assert isinstance(recipe, PuzzleRecipe)
    return recipe


@pytest.mark.parametrize("name", [name for name in recipe_names("reasoning") if not name.endswith("-demo") and name not in SUDOKU6])
def test_reasoners_have_the_published_sizes_and_settings(name: str) -> None:
    game, _, kind = name.partition("-")
    recipe = reasoner(name)
    blocks, steps, batch = REASONERS[kind.replace("attractor", "trm")]
    if kind.startswith("attractor"):
        steps, batch = ATTRACTORS[game]
    counted = count_reasoner(recipe.architecture)
    assert counted.total == sum(parameter.numel() for parameter in build_reasoner(recipe.architecture, device="meta").parameters())
    assert counted.matmul == blocks
    assert counted.total / 1e6 == pytest.approx(float(kind.rpartition("-")[2].removesuffix("m")), abs=0.5)
    assert (recipe.train.steps, recipe.train.global_batch, recipe.train.precision) == (steps, batch, "bf16")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.optimizer.betas) == (1e-4, 1.0, [0.9, 0.95])
    assert recipe.optimizer.ema == (None if kind.startswith(("hrm", "transformer")) else 0.999)
    assert recipe.schedule.warmup_steps == 2000
    assert recipe.supervision.steps == (1 if kind.startswith("transformer") else 16)
    assert read_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", ["sudoku-demo", "maze-demo"])
def test_demo_reasoners_are_small(name: str) -> None:
    size = 4 if name.startswith("sudoku") else 6
    recipe = load_any(name, ["model.vocabulary_size=6", f"model.cells={size * size}"])
    assert isinstance(recipe, PuzzleRecipe)
    assert recipe.model.kind == "attractor"
    assert 5e4 < count_reasoner(recipe.architecture).total < 5e5


@pytest.mark.parametrize(("name", "parameters"), SUDOKU6.items())
def test_arms_of_the_small_comparison_are_of_one_size(name: str, parameters: int) -> None:
    recipe = load_any(name, ["model.vocabulary_size=8", "model.cells=36"])
    assert isinstance(recipe, PuzzleRecipe)
    assert count_reasoner(recipe.architecture).total == parameters
    trm = load_any("sudoku6-trm")
    assert (recipe.optimizer, recipe.train, recipe.schedule) == (trm.optimizer, trm.train, trm.schedule)


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


@pytest.mark.parametrize("name", recipe_names("language"))
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


def test_the_pages_name_every_recipe() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    for regime, page in (("language", "recipes.md"), ("reasoning", "puzzles.md")):
        text = (docs / page).read_text(encoding="utf-8")
        assert not [name for name in recipe_names(regime) if name not in text]
