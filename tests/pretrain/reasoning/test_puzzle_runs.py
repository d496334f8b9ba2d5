"""Whole puzzle runs: resumed to the bit, every puzzle taken once, gradients of plain autograd, what a run leaves, two ranks as one.

Two launches, of one rank and of two, make all runs (tests/distributed/puzzle_ranks.py); the tests look at what each left behind.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.puzzles import PuzzleSet, PuzzleStream
from model.reasoning.cost import planned_work, reasoner_flops
from pretrain.checkpoint_listing import listing, verify_run
from pretrain.config import read_recipe
from pretrain.convert import convert
from pretrain.errors import SIGNALLED, Refusal
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.reasoning.evaluate import evaluate
from pretrain.reasoning.loaded import load_puzzle_run
from tests.distributed.ranks import run_ranks
from tests.pretrain.reasoning.tiny_puzzles import BATCH, SETTINGS, STEPS, TRAINING, tiny_puzzles

MODULE = "tests.distributed.puzzle_ranks"
EQUILIBRIUM = ("model.start=random", "model.path_noise=0.05", "model.step_size=0.9")
ATTRACTOR = ("model.kind=attractor", "solver.max_iterations=3", "solver.min_iterations=1", "gradient.mode=phantom", "gradient.steps=2")
HRM = ("model.kind=hrm", "supervision.halting=q_learning", "optimizer.ema=null")
BF16 = ("train.precision=bf16", "layout.zero=1")


@dataclass
class Runs:
    """By name: folders, and what each rank told."""

    folder: Path
    results: dict[str, list[dict[str, Any]]]
    plain: list[float]

    def records(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]

    def tensors(self, name: str, file: str = "weights") -> dict[str, Tensor]:
        checkpoints = self.folder / name / "checkpoints"
        return load_file(checkpoints / (checkpoints / "latest").read_text().strip() / f"{file}.safetensors")


def case(folder: Path, data: Path, name: str, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"overrides": [*SETTINGS, *overrides, f"data.path={data}", f"run.dir={folder / name}"], **more}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_puzzles(tmp_path_factory.mktemp("puzzles") / "prepared")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("alone")
    cases: dict[str, dict[str, Any]] = {"whole": case(folder, data, "whole", "evaluation.every=6", *ATTRACTOR)}
    for name, settings in {"equilibrium": EQUILIBRIUM, "attractor": (*ATTRACTOR, *BF16), "hrm": (*HRM, "layout.zero=1")}.items():
        cases[name] = case(folder, data, name, *settings)
        cases[f"{name} stopped"] = case(folder, data, f"{name} in parts", *settings, signalled=7)
        cases[f"{name} resumed"] = case(folder, data, f"{name} in parts", *settings, resume=True)
    cases["one micro-batch"] = case(folder, data, "one micro-batch", "train.micro_batch=4")
    cases["to be moved"] = case(folder, data, "to be moved", *HRM, signalled=7)
    cases["transformer"] = case(folder, data, "transformer", "model.kind=transformer", "supervision.steps=1", "train.steps=2")
    cases["vocabulary"] = case(folder, data, "vocabulary", "model.vocabulary_size=9")
    cases["other seed"] = case(folder, data, "equilibrium in parts", *EQUILIBRIUM, "data.augment=false", resume=True)
    overrides = case(folder, data, "plain", "train.micro_batch=4")["overrides"]
    (told,) = run_ranks(f"{MODULE}:alone", 1, list(cases.values()), overrides, STEPS, str(folder))
    return Runs(folder, {name: [result] for name, result in zip(cases, told["runs"], strict=True)}, told["plain"])


@pytest.fixture(scope="module")
def together(alone: Runs, data: Path) -> Runs:
    folder = alone.folder.with_name(alone.folder.name + "-together")
    shutil.copytree(alone.folder / "to be moved", folder / "moved")
    convert(alone.folder / "to be moved", {"data": 2, "zero": 1}, folder / "converted")
    cases = {
        "zero 0": case(folder, data, "zero 0", "train.micro_batch=1"),
        "zero 1": case(folder, data, "zero 1", "train.micro_batch=1", "layout.zero=1", "evaluation.every=6"),
        "moved": case(folder, data, "moved", *HRM, "train.micro_batch=2", "layout.zero=1", resume=True),
        "converted": case(folder, data, "converted", *HRM, "layout.zero=1", resume=True),
    }
    by_rank = run_ranks(f"{MODULE}:runs", 2, list(cases.values()))
    return Runs(folder, {name: [told[index] for told in by_rank] for index, name in enumerate(cases)}, [])


# --- resuming


@pytest.mark.parametrize("name", ["equilibrium", "attractor", "hrm"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(alone: Runs, name: str) -> None:
    assert [alone.results[f"{name} {part}"][0]["code"] for part in ("stopped", "resumed")] == [SIGNALLED, 0]
    files = ["weights", "carry"] + ([] if name == "hrm" else ["average"])
    for file in files:
        once, twice = alone.tensors(name, file), alone.tensors(f"{name} in parts", file)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[key], twice[key]) for key in once)
    taken = ("tokens_per_second", "step_seconds", "memory_bytes", "mfu")
    told = [[{k: v for k, v in line.items() if k not in taken} for line in alone.records(run)] for run in (name, f"{name} in parts")]
    assert told[0] == told[1]
    assert alone.records(name)[-1]["step"] == STEPS


def test_the_stop_was_in_mid_epoch_with_puzzles_under_way(alone: Runs) -> None:
    seen = alone.results["equilibrium stopped"][0]["steps"]
    assert len(seen) == 7
    assert seen[-1]["position"] % TRAINING != 0
    assert not all(seen[-1]["halted"]), "latents were carried over the stop"


def test_other_puzzles_are_refused(alone: Runs) -> None:
    (result,) = alone.results["other seed"]
    assert result["code"] == 2
    assert "data.augment" in result["message"]


# --- which puzzles


@pytest.mark.parametrize("name", ["whole", "equilibrium", "hrm"])
def test_halted_puzzles_are_replaced_and_counted_once(alone: Runs, data: Path, name: str) -> None:
    steps = alone.results[name][0]["steps"]
    stream = PuzzleStream(data)
    under_way: list[int | None] = [None] * BATCH
    following, finished = 0, 0
    for step in steps:
        for row in range(BATCH):
            if under_way[row] is None:
                under_way[row], following = following, following + 1
        assert [stream.read(position or 0, 1).inputs[0].tolist() for position in under_way] == step["rows"]
        assert step["position"] == following
        finished += sum(step["halted"])
        under_way = [None if halted else position for position, halted in zip(under_way, step["halted"], strict=True)]
    assert _positions(steps) == list(range(following))
    assert following > 2 * BATCH
    assert finished == sum(line["finished"] for line in alone.records(name)) == following - sum(row is not None for row in under_way)


def test_rows_halt_one_by_one_and_before_the_limit(alone: Runs) -> None:
    assert any(0 < sum(step["halted"]) < BATCH for step in alone.results["one micro-batch"][0]["steps"])
    held = [line["mean_steps"] for line in alone.records("one micro-batch") if line["finished"]]
    assert min(held) < 3


def test_nothing_carried_has_a_graph(alone: Runs) -> None:
    assert all(step["free"] for step in alone.results["whole"][0]["steps"])


# --- the step


def test_gradients_and_updates_are_those_of_a_plain_loop(alone: Runs) -> None:
    whole, split = alone.tensors("one micro-batch"), alone.records("one micro-batch")
    plain = load_file(alone.folder / "plain.safetensors")
    assert [line["loss"] for line in split] == pytest.approx(alone.plain, rel=1e-5)
    assert plain["puzzle_embedding.weight"].abs().max() > 0, "it has learnt"
    for name, weight in plain.items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-4, atol=1e-6)


def test_a_step_s_work_is_entered_in_the_ledger(alone: Runs) -> None:
    recipe = read_recipe((alone.folder / "hrm" / "config.yaml").read_text())
    assert isinstance(recipe, PuzzleRecipe)
    flops = reasoner_flops(recipe.architecture, planned_work(recipe.architecture))
    line = alone.records("hrm")[0]
    assert line["flops_step"] == pytest.approx(flops.hardware * BATCH * recipe.cells)
    assert (line["solver_evaluations"], line["applications"]) == (2 * 3 - 2 + 2 * 3, 2)


# --- what a run leaves


def test_a_run_leaves_its_record(alone: Runs, data: Path) -> None:
    lines, evaluations = alone.records("whole"), alone.records("whole", "evaluations.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [step * BATCH * 16 for step in range(1, STEPS + 1)]
    assert lines[0]["lr"] == 0 < lines[1]["lr"] < lines[2]["lr"] == lines[3]["lr"]
    measured = {"cross_entropy", "halting_loss", "exact", "cells", "halting_right", "finished", "mean_steps"}
    measured |= {"solver_iterations", "solver_evaluations", "applications", "solver_residual", "solver_converged"}
    assert measured <= lines[-1].keys()
    assert [line["exact"] is None for line in lines] == [line["finished"] == 0 for line in lines]
    assert any(line["finished"] == 0 for line in lines)
    assert all(line["mean_steps"] <= 3 for line in lines if line["finished"])
    assert [(line["step"], list(line["exact"])) for line in evaluations] == [(6, ["1", "3"]), (12, ["1", "3"])]
    summary = json.loads((alone.folder / "whole" / "summary.json").read_text())
    assert summary["evaluation"] == evaluations[-1]
    assert summary["parameters"]["total"] == sum(weight.numel() for weight in alone.tensors("whole").values())
    assert summary["flops"]["total"] == pytest.approx(sum(line["flops_step"] for line in lines))
    assert "validation at step 12  exact after steps 1: " in alone.results["whole"][0]["said"]


def test_the_average_of_the_weights_is_evaluated(alone: Runs, data: Path) -> None:
    loaded = load_puzzle_run(alone.folder / "whole", device=torch.device("cpu"))
    average, weights = alone.tensors("whole", "average"), alone.tensors("whole")
    assert any(not torch.equal(average[name], weights[name]) for name in weights)
    found = evaluate(loaded.model, PuzzleSet(data), [1, 3], torch.device("cpu"), batch=4)
    stored = alone.records("whole", "evaluations.jsonl")[-1]
    assert found["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    assert found["cells"] == pytest.approx(stored["cells"])


def test_its_checkpoints_are_listed_and_verified(alone: Runs) -> None:
    (row,) = listing(alone.folder / "whole")["checkpoints"]
    evaluation = alone.records("whole", "evaluations.jsonl")[-1]
    assert (row["step"], row["whole"], row["validation"]) == (STEPS, True, evaluation["loss"]["3"])
    assert verify_run(alone.folder / "whole", None)["checkpoints"][0]["step"] == STEPS


def test_a_transformer_takes_a_new_puzzle_at_every_step(alone: Runs) -> None:
    (result,) = alone.results["transformer"]
    assert [step["read"] for step in result["steps"]] == [[[0, 2], [2, 2]], [[4, 2], [6, 2]]]
    assert alone.tensors("transformer", "carry")["latents.0"].numel() == 0


def test_data_that_does_not_fit_is_refused_before_the_folder_is_made(alone: Runs) -> None:
    (result,) = alone.results["vocabulary"]
    assert (result["code"], result["there"]) == (2, False)
    assert "model.vocabulary_size=9" in result["message"]


# --- two ranks


@pytest.mark.parametrize("name", ["zero 0", "zero 1"])
def test_two_ranks_train_as_one(alone: Runs, together: Runs, name: str) -> None:
    assert [result["code"] for result in together.results[name]] == [0, 0]
    ranks, one = [result["steps"] for result in together.results[name]], alone.results["one micro-batch"][0]["steps"]
    for number, step in enumerate(one):
        both = [rank[number] for rank in ranks]
        assert [row for rank in both for row in rank["rows"]] == step["rows"]
        assert [row for rank in both for row in rank["halted"]] == step["halted"]
        assert _positions(both) == _positions([step])
        assert both[0]["loss"] == both[1]["loss"] == pytest.approx(step["loss"], rel=1e-5)
    _close(together.tensors(name), alone.tensors("one micro-batch"))
    _close(together.tensors(name, "carry"), alone.tensors("one micro-batch", "carry"))


@pytest.mark.parametrize("name", ["moved", "converted"])
def test_a_run_goes_on_with_other_ranks(alone: Runs, together: Runs, name: str) -> None:
    results = together.results[name]
    assert [result["code"] for result in results] == [0, 0]
    assert [row for result in results for row in result["steps"][-1]["rows"]] == alone.results["hrm"][0]["steps"][-1]["rows"]
    _close(together.tensors(name), alone.tensors("hrm"))
    _close(together.tensors(name, "carry"), alone.tensors("hrm", "carry"))


def test_a_tensor_parallel_layout_is_refused(alone: Runs) -> None:
    with pytest.raises(Refusal, match="data parallel"):
        convert(alone.folder / "to be moved", {"tensor": 2}, None)


def test_ranks_share_an_evaluation(together: Runs, data: Path) -> None:
    stored, puzzles = together.records("zero 1", "evaluations.jsonl")[-1], PuzzleSet(data)
    assert stored["puzzles"] == len(puzzles)
    loaded = load_puzzle_run(together.folder / "zero 1", device=torch.device("cpu"))
    found = evaluate(loaded.model, puzzles, [1, 3], torch.device("cpu"), batch=4)
    assert stored["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert stored["cells"] == pytest.approx(found["cells"])


def _positions(steps: list[dict[str, Any]]) -> list[int]:
    """Of the stream, that were read."""
    return sorted(position for step in steps for start, count in step["read"] for position in range(start, start + count))


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
