"""The plan's arithmetic: what follows from the recipe, its layout and model/cost.py, and what is read off the data."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.plan import make_plan, make_recommendation
from model.cost import count_parameters, flops
from pretrain.config import load_recipe, recipe_names
from pretrain.errors import Refusal
from pretrain.gpus import GPUS
from pretrain.layout import most_stages
from pretrain.partition import partition
from pretrain.recipe_files import LANGUAGE_REGIME

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
FOUR_HEADS = "model.heads=4"  # the 60M model has 5, and its vocabulary does not divide by 5: it cannot be cut
CUT = [FOUR_HEADS, "layout.tensor=2", "layout.pipeline=2", "train.micro_batch=1", "train.global_batch=64", "train.tokens=1e9"]


_ENDS = {"attractor": ["attractor"], "deq": ["attractor"], "parcae": ["loop", "coda"], "looped": ["loop", "coda"]}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.mark.parametrize("name", recipe_names(LANGUAGE_REGIME))
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
    batch = make_plan(load_recipe("attractor-770m"), 8).batch
    assert batch["micro_batch"] * batch["accumulation"] * batch["data_ranks"] == batch["global_batch"] == 256


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(Refusal, match="data ranks"):
        make_plan(load_recipe("attractor-770m"), 3)


def test_zero_stages_shard_one_thing_after_the_other() -> None:
    alone, shared = (make_plan(load_recipe("attractor-770m"), ranks).memory for ranks in (1, 8))
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


@pytest.mark.parametrize("name", recipe_names(LANGUAGE_REGIME))
def test_every_recipe_has_a_plan_of_a_cut_model(name: str) -> None:
    recipe = load_recipe(name, CUT)
    plan = make_plan(recipe, 16)
    json.dumps(plan.as_dict(), allow_nan=False)
    assert plan.layout == {"pipeline": 2, "data": 4, "tensor": 2, "zero": 1, "sequence_parallel": False}
    assert (plan.gpus, plan.batch["data_ranks"], plan.batch["accumulation"]) == (16, 4, 16)
    first, last = plan.stages
    assert (first.ranks, last.ranks) == ([0, 7], [8, 15])
    assert [first.blocks[0], first.blocks[1], last.blocks[1]] == [0, last.blocks[0], recipe.architecture.prelude]
    assert (first.holds, last.holds) == (["embedding"], [*_ENDS.get(plan.kind, []), "norm", "head"])
    dealt = partition(recipe.architecture, plan.sequence_length, 2, recompute=recipe.train.recompute)
    assert [(stage.blocks, stage.flops) for stage in plan.stages] == [([stage.first, stage.stop], stage.flops) for stage in dealt]
    row = next(row for row in plan.flops if row.iterations == plan.expected_iterations)
    assert first.flops + last.flops == pytest.approx(row.hardware)
    assert list(plan.memory) == ["1"], "a pipeline goes with ZeRO 1 alone"
    assert plan.memory["1"] == max((stage.memory for stage in plan.stages), key=lambda memory: memory["total"])
    assert (first.in_flight, last.in_flight) == (2, 1)
    assert 0 < plan.bubble < 1
    assert plan.estimate.step > 0


def test_ranks_of_a_plan_are_one_replica_unless_said() -> None:
    assert make_plan(load_recipe("attractor-140m")).gpus == 1
    assert make_plan(load_recipe("attractor-140m", CUT)).gpus == 4


def test_zero_stages_are_those_the_layout_allows() -> None:
    assert list(make_plan(load_recipe("attractor-140m"), 8).memory) == ["0", "1", "2", "3"]
    assert list(make_plan(load_recipe("attractor-140m", ["layout.tensor=2"]), 8).memory) == ["1", "2", "3"]


def test_stages_hold_the_whole_model_and_a_second_table() -> None:
    plan = make_plan(load_recipe("attractor-770m", ["layout.pipeline=4"]), 4)
    assert sum(stage.parameters for stage in plan.stages) == plan.parameters["total"] + plan.parameters["embedding"]


def test_solver_memory_falls_with_tensor_ranks() -> None:
    whole, half = (make_plan(load_recipe("attractor-140m", [f"layout.tensor={tensor}"])).memory["1"] for tensor in (1, 2))
    assert half["solver"] == whole["solver"] / 2
    assert half["activations"] < whole["activations"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["layout.tensor=3"], "layout.tensor may be 2 or 4"),
        (["layout.tensor=2", "--gpus", "7"], "Start 6 or 8 ranks"),
        (["layout.pipeline=9", "--gpus", "9"], "Use layout.pipeline=8 or less"),
        (["layout.pipeline=2", "layout.zero=3", "--gpus", "8"], "Use layout.zero=1, or layout.pipeline=1"),
        (["layout.tensor=2", "--gpus", "48"], "data ranks 8"),
        (["--hardware", "abacus"], "choose h100 or h200"),
        (["--recommend", "--gpus", "509"], "Try 256 GPUs"),
    ],
)
def test_what_cannot_be_is_refused_in_one_paragraph_with_what_can(words: list[str], named: str) -> None:
    result = run("attractor-140m", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr


@pytest.mark.parametrize("name", recipe_names(LANGUAGE_REGIME))
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.global_batch=64", "train.micro_batch=1", "--gpus", "64"],
        [*CUT, "--gpus", "256"],
        [FOUR_HEADS, "layout.tensor=2", "layout.sequence_parallel=true"],
        ["--gpus", "4", "--recommend"],
    ],
    ids=["one", "data", "cut", "tensor", "recommend"],
)
def test_tables_fit_80_columns_and_cut_no_word(name: str, words: list[str]) -> None:
    result = run(name, *words)
    assert result.exit_code == 0, result.stderr
    tables, _, command = result.stdout.partition("In full:")
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    assert "\n" not in command.strip()


def test_most_stages_fit_too() -> None:
    recipe = load_recipe("attractor-770m")
    words = [f"layout.pipeline={most_stages(recipe.architecture)}", "train.micro_batch=1"]
    lines = run("attractor-770m", *words).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("none" in line and "attractor" in line for line in lines) == 1, "the attractor has the last stage to itself"


def test_tables_are_those_the_layout_has() -> None:
    alone, two, cut = (run("attractor-140m", *words).stdout for words in ([], ["--gpus", "2"], CUT))
    for table, shown in (
        ("Layout of", [two, cut]),
        ("Estimated step", [two, cut]),
        ("Stages", [cut]),
        ("Memory a rank", [alone, two, cut]),
    ):
        assert [text for text in (alone, two, cut) if f"\n{table}" in text] == shown, table
    assert "A model, not a measurement" in re.sub(r"\s+", " ", two)


def test_the_command_of_a_recommendation_plans_it() -> None:
    shown = run("attractor-770m", "--gpus", "8", "--recommend", "train.seed=3")
    words = shlex.split(shown.stdout.partition("In full:")[2])
    assert words[:8] == ["attractor", "plan", "attractor-770m", "train.seed=3", "--gpus", "8", "--hardware", "h100"]
    document = json.loads(run(*words[2:], "--json").stdout)
    best = json.loads(run("attractor-770m", "--gpus", "8", "--recommend", "--json").stdout)[0]
    assert document["layout"] == {key: best[key] for key in ("pipeline", "data", "tensor", "zero", "sequence_parallel")}
    assert document["estimate"] == best["estimate"]
    assert max(stage["memory"]["total"] for stage in document["stages"]) == best["memory"]


def recommended() -> list[tuple[str, int, list[str]]]:
    """(recipe, GPUs, cells) of each row of the page's table of recommended layouts."""
    table = PAGE.read_text(encoding="utf-8").partition("## Recommended layouts")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:attractor|transformer|parcae)-[^|]+) \| (\d+) \| (.*) \|$", table, re.MULTILINE)
    return [(name, int(gpus), cells.split(" | ")) for name, gpus, cells in rows]


def test_the_page_recommends_every_published_size_on_8_64_and_256() -> None:
    names = {name for name in recipe_names() if re.fullmatch(r".*-(140m|370m|770m|1\.3b)", name)}
    assert {(name, gpus) for name, gpus, _ in recommended()} == {(name, gpus) for name in names for gpus in (8, 64, 256)}


def row(found: dict[str, Any]) -> list[str]:
    """Cells of the page's table for a recommendation."""
    said = found["estimate"]
    overrides = " ".join(found["overrides"])
    return [
        f"`{overrides}`" if overrides else "as it is",
        str(found["data"]),
        f"{found['memory'] / 1e9:.1f} GB",
        f"{said['step'] * 1e3:.0f} ms",
        f"{said['tokens_per_second']:,.0f}",
        f"{said['mfu']:.0%}",
    ]


@pytest.mark.parametrize(("name", "gpus", "cells"), recommended(), ids=str)
def test_the_page_says_what_plan_says(name: str, gpus: int, cells: list[str]) -> None:
    assert cells == row(make_recommendation(load_recipe(name), gpus, GPUS["h100"])[0])
