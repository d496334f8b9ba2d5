"""The plan of a puzzle recipe: every figure against the closed forms it stands on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.puzzle_plan import PuzzlePlan, complete_puzzles, make_puzzle_plan
from model.cost import Work
from model.reasoning.cost import count_reasoner, planned_work, reasoner_flops
from model.reasoning.memory import activation_bytes
from pretrain.config import PuzzleRecipe, load_any, recipe_names
from pretrain.errors import Refusal
from pretrain.recipe_files import REASONING_REGIME
from tests.pretrain.reasoning.puzzle_folders import write_puzzle_manifest, write_recipe

SUDOKU = ["model.vocabulary_size=11", "model.cells=81"]
SOLVED = ["model.kind=attractor", "gradient.mode=phantom", "gradient.steps=2"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def load(name: str, *overrides: str) -> PuzzleRecipe:
    found = load_any(name, overrides)
    assert isinstance(found, PuzzleRecipe)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return write_recipe(tmp_path)


@pytest.mark.parametrize("name", recipe_names(REASONING_REGIME))
def test_every_recipe_has_a_plan_that_is_json_and_fits(name: str) -> None:
    sizes = SUDOKU if name.startswith("sudoku") else ["model.vocabulary_size=6", "model.cells=900"]
    recipe = load(name, *sizes)
    document = json.loads(json.dumps(make_puzzle_plan(recipe).as_dict(), allow_nan=False))
    assert document["parameters"]["total"] == count_reasoner(recipe.architecture).total
    shown = run(name, *sizes)
    assert shown.exit_code == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout


@pytest.mark.parametrize("words", [[], SOLVED, ["model.kind=hrm", "supervision.halting=q_learning"]], ids=["trm", "attractor", "hrm"])
def test_figures_are_those_of_the_closed_forms(tiny: str, words: list[str]) -> None:
    recipe = load(tiny, *words)
    plan, config = make_puzzle_plan(recipe), recipe.architecture
    row, a_cell = plan.expected, reasoner_flops(config, planned_work(config))
    assert (row.training, row.hardware) == pytest.approx((16 * a_cell.model, 16 * a_cell.hardware))
    assert sum(row.parts.values()) == pytest.approx(row.hardware)
    assert row.step == pytest.approx(8 * row.training)
    assert plan.run_flops == pytest.approx(100 * row.step)
    assert (row.evaluations, row.applications) == (planned_work(config).evaluations, planned_work(config).applications)
    assert plan.batch | {"cells_per_step": 128, "steps": 100, "puzzle_steps": 800, "cells": 12800, "accumulation": 2} == plan.batch


def test_an_iteration_costs_an_application_a_cycle(tiny: str) -> None:
    recipe = load(tiny, *SOLVED, "model.outer_cycles=3")
    rows = {row.iterations: row for row in make_puzzle_plan(recipe).flops}
    application = 16 * reasoner_flops(recipe.architecture, Work(1.0, 0.0, 0.0)).solve
    assert set(rows) == {0, 1, 2, 4, 6, 8}
    assert rows[8].training - rows[0].training == pytest.approx(8 * 3 * application)
    assert rows[8].inference - rows[0].inference == pytest.approx(8 * 3 * application)
    assert rows[8].parts["implicit_backward"] == rows[0].parts["implicit_backward"]
    head = 16 * reasoner_flops(recipe.architecture, Work(0.0, 0.0, 0.0)).head_forward
    assert rows[1].inference == pytest.approx((3 * (1 + 2 + 1)) * application + head), "a solve of 1, k = 2, and y, in three cycles"


def test_inference_has_no_target_pass(tiny: str) -> None:
    """Of q_learning: its further forward pass belongs to training."""
    plain, learned = (make_puzzle_plan(load(tiny, "model.kind=hrm", f"supervision.halting={rule}")) for rule in ("halt", "q_learning"))
    assert learned.expected.inference == plain.expected.inference
    assert learned.expected.training > plain.expected.training


def test_memory(tiny: str) -> None:
    recipe = load(tiny)
    one, two = make_puzzle_plan(recipe), make_puzzle_plan(recipe, 2)
    count = one.parameters["total"]
    assert one.memory["0"] == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 12 * count,  # two moments and the average
        "latents": 8 * (2 * 17 * 32 * 4 + 2 * 16),
        "activations": 4 * activation_bytes(recipe.architecture, 4),
        "solver": 0.0,
        "total": sum(part for name, part in one.memory["0"].items() if name != "total"),
    }
    assert one.memory["1"]["optimizer"] == 16 * count, "and a copy of the weights"
    assert two.memory["1"]["optimizer"] == 8 * count
    assert two.memory["0"]["optimizer"] == 12 * count
    assert two.memory["1"]["latents"] == one.memory["1"]["latents"] / 2
    whole = make_puzzle_plan(load(tiny, *SOLVED, "model.solve=yz", "solver.history=2")).memory["1"]
    assert whole["solver"] == 4 * 2 * (5 + 2 * 2) * 4 * 17 * 32
    assert make_puzzle_plan(load(tiny, "train.precision=bf16")).memory["1"]["weights"] == 2 * count


def test_sizes_left_open_come_from_the_data(tiny: str, tmp_path: Path) -> None:
    left = ["model.vocabulary_size=null", "model.cells=null"]
    plan: PuzzlePlan = make_puzzle_plan(load(tiny, *left, f"data.path={write_puzzle_manifest(tmp_path / 'data')}"))
    assert (plan.vocabulary_size, plan.cells, plan.positions) == (6, 16, 17)
    with pytest.raises(Refusal, match=r"model\.vocabulary_size and model\.cells are left to the prepared puzzles"):
        make_puzzle_plan(load(tiny, *left))
    with pytest.raises(Refusal, match=r"model\.cells=81 is not that of the puzzles"):
        complete_puzzles(load(tiny, "model.cells=81", f"data.path={tmp_path / 'data'}"))
    with pytest.raises(Refusal, match="attractor data prepare"):
        complete_puzzles(load(tiny, f"data.path={tmp_path}"))


def test_json_is_one_document_and_nothing_else(tiny: str) -> None:
    assert json.loads(run(tiny, "--json").stdout) == json.loads(json.dumps(make_puzzle_plan(load(tiny)).as_dict()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--match", "flops", "demo"], "--match is for language models, and"),
        (["--recommend", "--gpus", "8"], "there is no layout to choose"),
        (["--hardware", "h200"], "attractor bench reasoning"),
        (["--gpus", "3"], "data ranks"),
    ],
)
def test_what_is_for_language_models_is_refused(tiny: str, words: list[str], said: str) -> None:
    result = run(tiny, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_expected_iterations_are_a_row_of_their_own(tiny: str) -> None:
    recipe = load(tiny, *SOLVED, "solver.expected_iterations=5.5")
    plan = make_puzzle_plan(recipe)
    assert [row.iterations for row in plan.flops] == [0, 1, 2, 4, 5.5, 8]
    at_eight = replace(recipe.architecture, solver=replace(recipe.solver, expected_iterations=8.0))
    assert plan.flops[-1].training == pytest.approx(16 * reasoner_flops(at_eight, planned_work(at_eight)).model)
