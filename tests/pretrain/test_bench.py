"""`attractor bench models`: kinds that are really side by side. Timings are not under test."""

from __future__ import annotations

from typing import Any

import pytest

from model.language_model import build
from pretrain.bench import bench_models, side_by_side
from pretrain.config import load_recipe

KINDS = ["transformer", "parcae", "looped", "deq", "attractor"]


@pytest.mark.parametrize(("recipe", "blocks"), [("demo", 4), ("edu-1m-deq", 4), ("edu-1m-parcae", 4), ("attractor-140m", 8), ("one", 2)])
def test_every_kind_has_the_recipe_s_width_and_as_many_blocks(recipe: str, blocks: int) -> None:
    given = load_recipe("demo", ["model.backbone_layers=1"]) if recipe == "one" else load_recipe(recipe)
    found = side_by_side(given)
    assert list(found) == KINDS
    for kind, each in found.items():
        model = build(each.architecture, device="meta")
        names = {name.rpartition(".query.")[0] for name, _ in model.named_parameters() if ".query." in name}
        assert (each.model.kind, each.model.width, len(names)) == (kind, given.model.width, blocks)
        assert each.optimizer == given.optimizer
        assert each.train == given.train


def test_rows_tell_what_ran() -> None:
    small = ["model.width=16", "model.heads=2", "model.vocabulary_size=64", "data.sequence_length=16", "train.micro_batch=2"]
    rows: list[dict[str, Any]] = bench_models(load_recipe("demo", small), 1, warm_up=0)
    assert [row["kind"] for row in rows] == KINDS
    applied = {row["kind"]: row["applications"] for row in rows}
    assert (applied["transformer"], applied["looped"], applied["deq"], applied["attractor"]) == (0, 2, 1, 1)
    assert 1 <= applied["parcae"] <= 4
    for row in rows:
        assert row["model_flops_per_second"] == pytest.approx(row["model_flops_per_token"] * row["tokens_per_second"])
        assert row["saved_bytes"] > 0
