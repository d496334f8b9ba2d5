"""Rows of `attractor bench generate` tell what ran. Their times are no test's business."""

from __future__ import annotations

import pytest

from pretrain.bench_generate import bench_generate
from pretrain.config import load_recipe

SMALL = ["model.width=32", "model.heads=2", "model.backbone_layers=2", "model.vocabulary_size=256", "train.micro_batch=2"]


@pytest.mark.parametrize("recipe", ["demo", "demo-transformer"])
def test_rows_tell_what_ran(recipe: str) -> None:
    rows = bench_generate(load_recipe(recipe, SMALL), 40, prompt=4, warm_up=3)
    assert [row["case"] for row in rows] == ["transformer", "attractor, 0", "attractor, auto"][: len(rows)]
    assert len(rows) == (3 if recipe == "demo" else 1)
    assert all(row["agreed"] == 1 and row["tokens"] == 40 for row in rows)
    assert all(row["tokens_per_second"] > 0 and row["uncached_tokens_per_second"] > 0 for row in rows)
    assert [row["iterations_per_token"] > 0 for row in rows] == [False, False, True][: len(rows)]
