"""The plan's arithmetic: what follows from the recipe and model/cost.py, and what is read off the data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launchers.plan import make_plan
from model.cost import count_parameters, flops
from pretrain.config import load_recipe, recipe_names
from pretrain.errors import Refusal


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_that_is_json(name: str) -> None:
    plan = make_plan(load_recipe(name))
    document = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert document["parameters"]["total"] == count_parameters(load_recipe(name).architecture).total
    assert {key for row in document["flops"] for key in row} == {field.name for field in dataclasses.fields(plan.flops[0])}


def test_iterations_cost_inference_and_forward_alike_and_backward_nothing() -> None:
    rows = {row.iterations: row for row in make_plan(load_recipe("attractor-140m")).flops}
    assert set(rows) == {0, 1, 2, 4, 6, 8}
    step = rows[2].inference - rows[1].inference
    assert step > 0
    assert rows[8].inference - rows[0].inference == pytest.approx(8 * step)
    assert rows[8].forward - rows[0].forward == pytest.approx(8 * step)
    assert rows[8].backward == rows[0].backward
    assert all(row.forward + row.backward == pytest.approx(row.training) for row in rows.values())


def test_a_transformer_has_one_row() -> None:
    plan = make_plan(load_recipe("transformer-140m"))
    assert [row.iterations for row in plan.flops] == [None]
    assert plan.expected_iterations is None


def test_run_flops_are_the_token_s_at_the_expected_iterations_times_tokens() -> None:
    recipe = load_recipe("attractor-140m")
    plan = make_plan(recipe)
    a_token = flops(recipe.architecture, 2048, recipe.solver.expected_iterations).model
    assert plan.run_flops == pytest.approx(a_token * plan.batch["steps"] * 256 * 2048)
    assert plan.batch["tokens"] <= plan.batch["budget"] < plan.batch["tokens"] + plan.batch["tokens_per_step"]


def test_batch_on_several_ranks() -> None:
    batch = make_plan(load_recipe("attractor-770m"), data_ranks=8).batch
    assert batch["micro_batch"] * batch["accumulation"] * batch["data_ranks"] == batch["global_batch"] == 256


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(Refusal, match="data ranks"):
        make_plan(load_recipe("attractor-770m"), data_ranks=3)


def test_zero_stages_shard_one_thing_after_the_other() -> None:
    alone, shared = (make_plan(load_recipe("attractor-770m"), data_ranks=ranks).memory for ranks in (1, 8))
    for stage, sharded in ((0, set()), (1, {"optimizer"}), (2, {"optimizer", "gradients"}), (3, {"optimizer", "gradients", "weights"})):
        for part in ("weights", "gradients", "optimizer"):
            expected = alone[str(stage)][part] / (8 if part in sharded else 1)
            assert shared[str(stage)][part] == pytest.approx(expected)


def test_open_sizes_come_from_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manifest:
        vocabulary_size, sequence_length = 1000, 128

    monkeypatch.setattr("data_pipeline.open_manifest", lambda path, cache: Manifest)
    plan = make_plan(load_recipe("demo", ["model.vocabulary_size=null", "data.sequence_length=null", "data.path=x"]))
    assert (plan.vocabulary_size, plan.sequence_length) == (1024, 128)


def test_open_sizes_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"model\.vocabulary_size is left to the prepared data"):
        make_plan(load_recipe("demo", ["model.vocabulary_size=null"]))
    with pytest.raises(Refusal, match=r"data\.sequence_length is left to the prepared data"):
        make_plan(load_recipe("demo", ["data.sequence_length=null"]))
    with pytest.raises(Refusal, match="attractor data prepare"):
        make_plan(load_recipe("demo", ["model.vocabulary_size=null", f"data.path={tmp_path}"]))
