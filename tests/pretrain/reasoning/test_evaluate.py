"""Evaluation on puzzles against a plain loop over the model, one puzzle at a time; buckets, halting and breadth on constructed cases."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.puzzles import PuzzleSet, maze_valid_and_shortest
from model.reasoning.loss import cross_entropy
from pretrain.errors import Refusal
from pretrain.layout import Layout
from pretrain.mesh import Mesh
from pretrain.reasoning.breakdown import by_breadth, by_difficulty, chosen, halting_report, parts_of
from pretrain.reasoning.evaluate import evaluate, spread, valid_by_step
from pretrain.reasoning.internalization import batch_sums, totals
from pretrain.reasoning.loaded import LoadedPuzzleRun, load_puzzle_run, puzzles_for
from pretrain.reasoning.report import evaluate_puzzle_run
from pretrain.reasoning.traces import Traces, starting, trace
from tests.pretrain.reasoning.untrained_puzzle_runs import STEP, VALIDATION, prepare, write_untrained_puzzle_run

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {game: prepare(game, folder / game) for game in ("sudoku", "maze")}


@pytest.fixture(scope="module")
def runs(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_untrained_puzzle_run(folder / kind, sets["maze"], kind) for kind in ("attractor", "random", "hrm", "transformer")}


def plainly(loaded: LoadedPuzzleRun, puzzles: PuzzleSet, steps: int, iterations: int | None = None) -> dict[str, torch.Tensor]:
    """Figures [n, steps] of every puzzle alone."""
    model, found = loaded.model, []
    for row in range(len(puzzles)):
        one, figures = puzzles.batch(slice(row, row + 1)), []
        latents = starting(model, one.index, CPU)
        for _ in range(steps):
            with torch.no_grad():
                thought = model(latents, one.inputs, one.identifiers, iterations)
            grid, old, latents = thought.logits.argmax(-1), latents, thought.latents
            right = (grid == one.answers).float()
            loss = F.cross_entropy(thought.logits[0], one.answers[0].long())
            if model.config.supervision.loss == "stablemax":
                loss = cross_entropy("stablemax", thought.logits, one.answers).mean()
            stop = thought.q_halt > (thought.q_continue if model.config.supervision.halting == "q_learning" else 0)
            valid = maze_valid_and_shortest(one.inputs, grid.to(torch.uint8), puzzles.manifest.width)[0]
            changed = math.sqrt(sum(float((new - was).square().sum()) for new, was in zip(latents, old, strict=True)))
            size = math.sqrt(sum(float(new.square().sum()) for new in latents))
            iterated = float(thought.record.get("solver_iterations", torch.tensor(0.0)))
            applied = float(thought.record["solver_evaluations"])
            moved = changed / size if size else 0.0
            figures.append([float(loss), float(right.mean()), float(right.all()), float(stop), float(valid), moved, iterated, applied])
        found.append(figures)
    names = ("loss", "cells", "exact", "stop", "valid", "residual", "iterations", "evaluations")
    return dict(zip(names, torch.tensor(found, dtype=torch.float64).unbind(-1), strict=True))


@pytest.mark.parametrize("kind", ["attractor", "hrm", "random", "transformer"])
def test_every_figure_is_that_of_a_plain_loop(runs: dict[str, Path], kind: str) -> None:
    loaded = load_puzzle_run(runs[kind])
    puzzles = puzzles_for(loaded.recipe)
    with torch.no_grad():  # a rule that some grids and some halts meet
        loaded.model.halting.bias.copy_(torch.tensor([0.1, 0.0]))
    asked = [1] if kind == "transformer" else [1, 2, STEPS]
    whole = plainly(loaded, puzzles, asked[-1])
    report = evaluate(loaded.model, puzzles, [1, 2, STEPS], CPU, batch=3)
    assert report["puzzles"] == VALIDATION
    for name in ("loss", "exact", "cells", "valid"):
        assert list(report[name]) == [str(step) for step in asked]
        for step in asked:
            assert report[name][str(step)] == pytest.approx(float(whole[name][:, step - 1].mean()), rel=1e-5, abs=1e-9)
    halts = [next((step for step in range(asked[-1]) if row[step]), asked[-1] - 1) + 1 for row in whole["stop"].tolist()]
    assert report["halting_steps"] == pytest.approx(sum(halts) / VALIDATION)
    assert report["evaluations"] == pytest.approx(float(whole["evaluations"].mean()))
    assert report.get("iterations", 0.0) == pytest.approx(float(whole["iterations"].mean()))
    traces = trace(loaded.model, puzzles.batch(slice(None)), asked[-1], CPU, batch=3)
    assert torch.allclose(traces.residual.double(), whole["residual"], rtol=1e-4)


def test_what_is_exact_counts_as_exact_and_valid(runs: dict[str, Path]) -> None:
    loaded = load_puzzle_run(runs["attractor"])
    puzzles = puzzles_for(loaded.recipe)
    batch = puzzles.batch(slice(None))
    told = torch.zeros(VALIDATION, dtype=torch.bool)
    told[::2] = True
    grids = torch.where(told[:, None], batch.answers, batch.inputs)

    def oracle(latents: object, inputs: torch.Tensor, identifiers: torch.Tensor, iterations: int | None = None) -> object:
        rows = torch.stack([(batch.inputs == own).all(1).int().argmax() for own in inputs])
        logits = F.one_hot(grids[rows].long(), 6).float()
        return real(latents, inputs, identifiers, iterations)._replace(logits=logits)

    real = loaded.model.forward
    with patch.object(loaded.model, "forward", oracle):
        report = evaluate(loaded.model, puzzles, [1, 2], CPU, batch=4)
    share = float(told.double().mean())
    assert report["exact"] == report["valid"] == {"1": pytest.approx(share), "2": pytest.approx(share)}
    assert report["exact_error"]["2"] == pytest.approx(math.sqrt(share * (1 - share) / VALIDATION))
    assert share < report["cells"]["2"] < 1


def test_another_path_as_short_is_valid_and_not_exact(sets: dict[str, Path]) -> None:
    batch = PuzzleSet(sets["maze"]).batch(slice(0, 1))
    inputs = torch.tensor([[3, 2, 1, 1, 1, 2, 4, 1, 1, 1, *[1] * 15]], dtype=torch.uint8)
    one, other = inputs.clone(), inputs.clone()
    one[0, 5], other[0, 1] = 5, 5
    traces = Traces(*[torch.zeros(1, 2)] * 5, answers={1: other, 2: inputs}, record={})
    puzzles = batch._replace(inputs=inputs, answers=one)
    valid = valid_by_step(traces, puzzles, PuzzleSet(sets["maze"]).manifest)
    assert {step: told.tolist() for step, told in valid.items()} == {1: [True], 2: [False]}


def test_ranks_take_shares_and_a_limit_is_spread(runs: dict[str, Path]) -> None:
    loaded = load_puzzle_run(runs["random"])
    puzzles = puzzles_for(loaded.recipe)
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 9).tolist() == [0, 1, 2]
    alone = evaluate(loaded.model, puzzles, [1, 3], CPU, batch=2, limit=5)
    told: list[object] = []
    for place in range(2):
        with patch("pretrain.reasoning.evaluate.gather", lambda own: told.append(own) or told):
            shared = evaluate(loaded.model, puzzles, [1, 3], CPU, Mesh(Layout(data=2), place), batch=9, limit=5)
    assert shared.keys() == alone.keys()
    for name in ("loss", "cells", "exact", "valid"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-5)
    assert (shared["puzzles"], shared["halting_steps"]) == (5, alone["halting_steps"])


def made(exact: list[list[int]], stop: list[list[int]] | None = None, residual: list[list[float]] | None = None) -> Traces:
    table = torch.tensor(exact, dtype=torch.bool)
    zeros = torch.zeros(table.shape)
    halts = table if stop is None else torch.tensor(stop, dtype=torch.bool)
    return Traces(zeros, zeros, table, halts, zeros if residual is None else torch.tensor(residual), {}, {})


def test_the_start_of_the_smallest_residual_is_chosen() -> None:
    nan = float("nan")
    first = made([[1, 1], [0, 0], [0, 1]], residual=[[0.1, 0.9], [0.5, nan], [0.3, 0.3]])
    second = made([[0, 0], [1, 1], [0, 0]], residual=[[0.2, 0.1], [0.4, 0.9], [0.4, 0.4]])
    third = made([[0, 1], [0, 0], [1, 0]], residual=[[0.9, 0.2], [0.9, 0.95], [0.1, 0.5]])
    assert chosen([first, second, third]).tolist() == [[0, 1], [1, 1], [2, 0]]
    one, three = by_breadth([first, second, third], [1, 3], [1, 2])
    assert one["chosen"] == one["mean"] == one["any"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3)}
    assert three["chosen"] == {"1": pytest.approx(1.0), "2": pytest.approx(2 / 3)}
    assert three["mean"] == {"1": pytest.approx(3 / 9), "2": pytest.approx(4 / 9)}
    assert three["any"] == {"1": pytest.approx(1.0), "2": pytest.approx(1.0)}


def test_parts_hold_a_fifth_each_and_equal_ratings_stay_together() -> None:
    ratings = torch.arange(50).flip(0)
    assert parts_of(ratings).bincount().tolist() == [10] * 5
    assert parts_of(ratings)[-1] == 0
    assert parts_of(torch.tensor([0] * 7 + [3, 4, 9])).tolist() == [1] * 7 + [3, 4, 4]
    assert parts_of(torch.zeros(4)).unique().numel() == 1
    traces = made([[0, 1], [1, 1], [0, 0], [0, 1]])
    easy, hard = by_difficulty(traces, torch.tensor([8, 1, 8, 1]), [1, 2])
    assert (easy["least"], easy["largest"], easy["puzzles"]) == (1, 1, 2)
    assert (easy["exact"], hard["exact"]) == ({"1": 0.5, "2": 1.0}, {"1": 0.0, "2": 0.5})
    assert hard["exact_error"]["2"] == pytest.approx(math.sqrt(0.25 / 2))
    assert (easy["halting_steps"], hard["halting_steps"]) == (1.5, 2.0)


def test_halting_is_what_stopping_there_would_give() -> None:
    exact = [[0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    stop = [[0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    report = halting_report(made(exact, stop))
    assert report["steps"] == pytest.approx((2 + 1 + 1 + 3 + 3) / 5)
    assert report["saved"] == pytest.approx(1 - 2 / 3)
    assert report["exact"] == pytest.approx(3 / 5)
    assert report["exact_all_steps"] == pytest.approx(2 / 5)
    assert report["stopped"] == {"right": 0.4, "wrong": 0.2, "never_right": 0.2, "never_wrong": 0.2}
    assert report["judged_right"] == {"1": 0.8, "2": pytest.approx(3 / 5), "3": pytest.approx(2 / 5)}


def test_the_report_cuts_solves_and_tries_starts(runs: dict[str, Path]) -> None:
    seen: list[float] = []
    report = evaluate_puzzle_run(runs["random"], steps=[1, 3], iterations=[1, "auto", 0], breadths=[1, 3], batch=5, progress=seen.append)
    loaded = load_puzzle_run(runs["random"])
    puzzles = puzzles_for(loaded.recipe)
    assert [row["iterations"] for row in report["by_iterations"]] == ["0", "1", "auto"]
    for row, count in zip(report["by_iterations"], (0, 1, None), strict=True):
        plain = plainly(loaded, puzzles, 3, count)
        assert row["loss"] == pytest.approx(float(plain["loss"][:, -1].mean()), rel=1e-5)
        assert row["cells"] == pytest.approx(float(plain["cells"][:, -1].mean()))
        assert row["evaluations"] == pytest.approx(float(plain["evaluations"].mean()))
        assert row["difference"] == pytest.approx(row["exact"] - report["exact"]["3"])
    assert [row["breadth"] for row in report["by_breadth"]] == [1, 3]
    starts = [trace(loaded.model, puzzles.batch(slice(None)), 3, CPU, batch=9, start=number) for number in range(3)]
    assert report["by_breadth"] == by_breadth(starts, [1, 3], [1, 3])
    assert not torch.equal(starts[0].loss, starts[1].loss)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    assert (report["step"], report["kind"], report["game"], report["weights"]) == (STEP, "attractor", "maze 5x5", "weights.safetensors")


def test_internalization_cuts_one_step_or_all(runs: dict[str, Path]) -> None:
    loaded = load_puzzle_run(runs["attractor"])
    batch = puzzles_for(loaded.recipe).batch(slice(None))
    sums, by_step = batch_sums(loaded.model, batch, 3, [0, 2], CPU)
    report = totals(sums, by_step, VALIDATION, [0, 2])
    model = loaded.model
    with torch.no_grad():
        before = model.start(VALIDATION)
        alone = before
        for _ in range(2):
            before = model(before, batch.inputs, batch.identifiers).latents
            alone = model(alone, batch.inputs, batch.identifiers, 2).latents
        auto = model(before, batch.inputs, batch.identifiers)
        grids = {
            "this_step": model(before, batch.inputs, batch.identifiers, 2).logits.argmax(-1),
            "all_steps": model(alone, batch.inputs, batch.identifiers, 2).logits.argmax(-1),
        }
    for way, grid in grids.items():
        assert report[way]["cells"]["2"][2] == pytest.approx(float((grid == batch.answers).double().mean()))
        assert report[way]["agreement"]["2"][2] == pytest.approx(float((grid == auto.logits.argmax(-1)).double().mean()))
        assert report[way]["agreement"]["auto"] == [1.0] * 3
    moved = (auto.latents[1] - before[1]).flatten(1).norm(dim=1) / before[1].flatten(1).norm(dim=1)
    assert report["distance"][2] == pytest.approx(float(moved.mean()), rel=1e-5)
    assert report["this_step"]["cells"]["0"] != report["all_steps"]["cells"]["0"]


def test_other_puzzles_no_run_and_other_weights_are_refused(sets: dict[str, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_puzzle_run(runs["attractor"]).recipe
    assert len(puzzles_for(recipe, str(sets["maze"]))) == VALIDATION
    with pytest.raises(Refusal, match="sudoku, 4x4"):
        puzzles_for(recipe, str(sets["sudoku"]))
    with pytest.raises(Refusal, match="There is no run in"):
        load_puzzle_run(tmp_path)
    other = replace(recipe.model, width=24, heads=2)
    (runs["attractor"] / "config.yaml").rename(tmp_path / "kept.yaml")
    (runs["attractor"] / "config.yaml").write_text(recipe.model_copy(update={"model": other}).to_yaml())
    with pytest.raises(Refusal, match="not those of the model"):
        load_puzzle_run(runs["attractor"])
    (tmp_path / "kept.yaml").rename(runs["attractor"] / "config.yaml")
