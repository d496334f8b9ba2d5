"""`attractor sweep` of a puzzle recipe: its members, the columns of its table, what is planned and what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.series import check
from launchers.sweep import Sweep, make_sweep, write
from launchers.sweep_rows import cells, row
from model.reasoning.cost import count_reasoner, planned_work, reasoner_flops
from pretrain.config import PuzzleRecipe
from pretrain.errors import Refusal
from tests.pretrain.reasoning.puzzle_folders import CELLS, write_puzzle_manifest, write_recipe
from tests.pretrain.run_folders import write_manifest, write_run

SOLVED = ["model.kind=attractor", "gradient.mode=phantom"]
EVALUATION = {
    "step": 100,
    "loss": {"1": 1.2, "4": 0.7},
    "exact": {"1": 0.1, "4": 0.625},
    "cells": {"1": 0.5, "4": 0.9},
    "iterations": 3.25,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture
def swept(tmp_path: Path) -> Sweep:
    """Two seeds at two widths."""
    data = write_puzzle_manifest(tmp_path / "data")
    words = [*SOLVED, "train.seed=0,1", "model.width=32,64", f"data.path={data}"]
    return make_sweep(write_recipe(tmp_path), words, tmp_path / "out")


def finish(folder: Path, recipe: Any, **evaluation: Any) -> None:
    """Writes what a finished run of the recipe leaves."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    found = {"step": 100, "total_steps": 100, "tokens": 12800, "seconds": 7.5, "flops": {"model": 3e9}, "metrics": {"memory_bytes": 2**30}}
    (folder / "summary.json").write_text(json.dumps({**found, "evaluation": {**EVALUATION, **evaluation}}))


def test_members_are_puzzle_recipes(swept: Sweep) -> None:
    assert [member.name for member in swept.members] == [f"seed={seed},width={width}" for seed in (0, 1) for width in (32, 64)]
    recipes = check(swept.members, 1)
    assert all(isinstance(recipe, PuzzleRecipe) for recipe in recipes)
    assert [(recipe.train.seed, recipe.model.width) for recipe in recipes] == [(0, 32), (0, 64), (1, 32), (1, 64)]
    assert make_sweep(swept.members[0].recipe, ["evaluation.steps=[1],[1,4]"]).settings == [
        {"evaluation.steps": [1]},
        {"evaluation.steps": [1, 4]},
    ]
    with pytest.raises(Refusal, match=r"Did you mean `train\.seed`"):
        make_sweep(swept.members[0].recipe, ["train.sead=1,2"])


def test_a_row_is_what_is_planned_until_the_run_has_finished(swept: Sweep) -> None:
    recipe, member = check(swept.members, 1)[1], swept.members[1]
    assert isinstance(recipe, PuzzleRecipe)
    planned, config = row(swept.settings[1], member, recipe), recipe.architecture
    assert planned["state"] == "to train"
    assert planned["parameters"]["total"] == count_reasoner(config).total
    assert (planned["steps"], planned["puzzle_steps"], planned["tokens"]) == (100, 800, 800 * CELLS)
    assert planned["flops"] == pytest.approx(reasoner_flops(config, planned_work(config)).model * 800 * CELLS)
    assert [planned[key] for key in ("exact", "cells", "valid", "loss", "iterations", "seconds")] == [None] * 6
    finish(member.run, recipe)
    done = row(swept.settings[1], member, recipe)
    assert done["state"] == "finished"
    assert (done["exact"], done["cells"], done["loss"], done["iterations"]) == (0.625, 0.9, 0.7, 3.25)
    assert (done["flops"], done["seconds"], done["memory_bytes"]) == (3e9, 7.5, 2**30)
    text = cells(done)
    assert (text["exact"], text["cells"], text["valid"], text["iterations"]) == ("62.5 %", "90.0 %", "", "3.25")
    assert (text["steps"], text["puzzle steps"], text["FLOPs"], text["memory"]) == ("100", "800", "3 G", "1 GiB")


def test_the_table_says_what_its_figures_are(swept: Sweep) -> None:
    recipes = check(swept.members, 1)
    for member, recipe in zip(swept.members, recipes, strict=True):
        finish(member.run, recipe, valid={"4": 0.75})
    rows = [row(*parts) for parts in zip(swept.settings, swept.members, recipes, strict=True)]
    text = write(swept, rows).read_text()
    assert (
        "| train.seed | model.width | parameters | in matmuls | steps | puzzle steps | FLOPs | exact | cells | valid | iterations |" in text
    )
    assert text.count("| 62.5 % | 90.0 % | 75.0 % | 3.25 | 8 | 1 GiB | finished |") == 4
    assert "with every cell right" in text
    assert json.loads((swept.out / "sweep.json").read_text())["members"] == rows


def test_plan_fits_a_terminal_and_starts_nothing(swept: Sweep) -> None:
    member = swept.members[0]
    shown = run(member.recipe, *member.overrides[:2], "train.seed=0,1", "model.width=32,64", "--plan", "--out", swept.out)
    assert shown.exit_code == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert len(re.findall(r"seed=\d,width=\d+: to train", shown.stdout)) == 4
    assert "The same in all: steps 100, puzzle steps 800" in shown.stdout
    assert not swept.out.exists()


def test_folders_of_other_runs_are_refused(swept: Sweep, tmp_path: Path) -> None:
    first = swept.members[0]
    recipe = check(swept.members, 1)[0]
    finish(first.run, recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 90})}))
    (first.run / "checkpoints").mkdir()
    with pytest.raises(Refusal, match=r"seed=0,width=32: .* holds a run with other settings: train\.steps=90 \(asked for: 100\)"):
        check(swept.members, 1)
    write_run(swept.members[1].run, write_manifest(tmp_path / "text"), lambda _: 5.0)
    (first.run / "config.yaml").write_text(recipe.to_yaml())
    with pytest.raises(Refusal, match=r"seed=0,width=64: .* holds a run of another regime"):
        check(swept.members, 1)
