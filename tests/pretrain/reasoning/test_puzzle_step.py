"""What a step is told and tells: how long rows must stay, and the figures of the puzzles that have finished."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from pretrain.config import PuzzleRecipe, load_any
from pretrain.layout import Layout
from pretrain.mesh import Mesh
from pretrain.reasoning.regime import Puzzles, shares
from pretrain.reasoning.running import Running
from pretrain.reasoning.step import FINISHED, PuzzleStep
from tests.pretrain.reasoning.tiny_puzzles import SETTINGS


def test_exploration_is_drawn_anew_at_every_step_as_published() -> None:
    overrides = ["train.global_batch=20_000", "train.micro_batch=5_000", "supervision.steps=6", "supervision.exploration=0.25"]
    recipe = load_any("sudoku-demo", [*SETTINGS, *overrides])
    assert isinstance(recipe, PuzzleRecipe)
    running = object.__new__(Running)
    running.__dict__ |= {"seed": 0, "rows": 20_000, "micro": 5_000, "supervision": recipe.supervision, "device": torch.device("cpu")}
    running.mesh = Mesh(Layout(), 0)
    drawn = [running.least_steps(step) for step in range(2)]
    assert [len(part) for part in drawn[0]] == [5_000] * 4
    first, second = (torch.cat(parts) for parts in drawn)
    assert not first.equal(second)
    counts = first.bincount(minlength=7) / 20_000
    assert counts[1] == 0
    assert float(counts[0]) == pytest.approx(0.75, abs=0.015)  # five deviations of a share of 20,000
    assert counts[2:].tolist() == pytest.approx([0.05] * 5, abs=0.008)


def test_a_line_tells_of_puzzles_finished_since_the_line_before() -> None:
    one = dict.fromkeys(FINISHED, 1.0)
    means = {"solver_evaluations": 1.0, "applications": 1.0, "products": 0.0}
    applied = [True, False, True, True]  # a skipped step has a line of its own

    def step(engine: Any, running: Any, number: int, *, stop_requested: bool) -> PuzzleStep:
        return PuzzleStep(0.0, applied[number], False, 0.0, 1.0, means, one)

    regime = object.__new__(Puzzles)
    recipe = load_any("sudoku-demo", [*SETTINGS, "train.log_every=4"])
    regime.__dict__ |= {"recipe": recipe, "engine": None, "running": None, "finished": dict.fromkeys(FINISHED, 0.0)}
    with patch("pretrain.reasoning.regime.supervision_step", step):
        told = [regime.step(number=number, stop_requested=False, beat=lambda _: None).measured["finished"] for number in range(4)]
    assert told == [1, 2, 1, 2]


def test_shares_are_of_finished_puzzles() -> None:
    sums = {"finished": 4.0, "finished_cells": 3.0, "finished_exact": 1.0, "finished_halting": 2.0, "finished_steps": 10.0}
    assert shares(sums) == {"finished": 4.0, "exact": 0.25, "cells": 0.75, "halting_right": 0.5, "mean_steps": 2.5}
