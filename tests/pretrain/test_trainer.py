"""The trainer's loop through real runs: non-finite steps, a full disk, accumulation, bf16, mirrors, data that does not fit, a finished run.

Two launches, of one rank and of two, make all runs (trainer_ranks.py); the tests look at what each left behind.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.errors import BAD_CHECKPOINT_WRITE, NON_FINITE, SIGNALLED
from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import BATCH, LENGTH, SETTINGS, prepare_text

TARGET = "tests.pretrain.trainer_ranks:runs"
KEYS = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "flops_step", "flops_total"]
KEYS += ["solver_iterations", "solver_evaluations", "solver_residual", "solver_converged", "memory_bytes"]
SUMMARY = "summary.json"


@dataclass
class Runs:
    """By name: folders, and what each rank returned."""

    folder: Path
    results: dict[str, list[dict[str, Any]]]

    def records(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / SUMMARY).read_text())

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        checkpoints = self.folder / name / "checkpoints"
        return load_file(checkpoints / (checkpoints / "latest").read_text().strip() / "weights.safetensors")


def case(folder: Path, data: Path, name: str, *overrides: str, steps: int = 6, **more: Any) -> dict[str, Any]:
    """The tiny run with changes; later overrides win."""
    settings = [*SETTINGS, f"train.tokens={steps * BATCH * LENGTH}", "optimizer.ema=null", "evaluation.every=1000", f"data.path={data}"]
    return {"overrides": [*settings, *overrides, f"run.dir={folder / name}"], **more}


def launch(folder: Path, ranks: int, cases: dict[str, dict[str, Any]]) -> Runs:
    by_rank = run_ranks(TARGET, ranks, list(cases.values()))
    return Runs(folder, {name: [results[index] for results in by_rank] for index, name in enumerate(cases)})


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("alone")
    other_tokenizer = shutil.copytree(data, folder / "other_tokenizer")
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (other_tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer))
    mirrored = ("telemetry.tensorboard=true", "telemetry.wandb=offline", "train.precision=bf16", "evaluation.every=2")
    adamw = ("optimizer.name=adamw", "optimizer.eps=1e-4")  # larger than rounding, which Adam would else blow up to full steps
    cases = {
        "skips": case(folder, data, "skips", "train.nonfinite_limit=3", "train.log_every=4", broken=[2, 3]),
        "fatal": case(folder, data, "fatal", "train.nonfinite_limit=2", "layout.zero=0", broken=[2, 4, 5]),
        "whole batch": case(folder, data, "whole batch", "train.micro_batch=4", *adamw),
        "two micro-batches": case(folder, data, "two micro-batches", "train.micro_batch=2", *adamw),
        "bf16": case(folder, data, "bf16", *mirrored, "layout.zero=1", "data.mask_documents=true"),
        "finished": case(folder, data, "bf16", *mirrored, "layout.zero=1", "data.mask_documents=true", resume=True),
        "vocabulary": case(folder, data, "vocabulary", "model.vocabulary_size=256"),
        "length": case(folder, data, "length", "data.sequence_length=8"),
        "tokenizer": case(folder, other_tokenizer, "tokenizer"),
        "nothing to validate on": case(folder, prepare_text(folder / "train_only", validation=0), "nothing to validate on"),
    }
    shutil.copytree(data, folder / "moved")
    cases["stopped"] = case(folder, data, "moving", signalled=2)
    cases["data moved"] = case(folder, folder / "moved", "moving", resume=True)
    cases["disk full"] = case(folder, data, "full", "checkpoint.every=2", full_at=4)
    cases["room again"] = case(folder, data, "full", "checkpoint.every=2", resume=True)
    cases["stopped too"] = case(folder, data, "mixing", signalled=2)
    cases["data changed"] = case(folder, prepare_text(folder / "longer", sequence_length=17), "mixing", resume=True)
    cases["data changed"]["overrides"].append("data.sequence_length=17")
    return launch(folder, 1, cases)


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("together")
    cases = {
        "one rank breaks": case(
            folder, data, "one rank breaks", "layout.zero=3", "train.nonfinite_limit=2", broken=[2, 4, 5], broken_rank=1
        ),
        "one rank is asked": case(folder, data, "one rank is asked", "train.precision=bf16", "layout.zero=2", signalled=3, signal_rank=1),
    }
    return launch(folder, 2, cases)


# --- non-finite steps


def test_a_non_finite_step_is_skipped_counted_and_reported(alone: Runs) -> None:
    (result,) = alone.results["skips"]
    assert result["code"] == 0
    assert [applied for _, _, applied, *_ in result["steps"]] == [True, False, False, True, True, True]
    records = alone.records("skips")
    assert [(record["step"], record["skipped_steps"]) for record in records] == [(2, 1), (3, 2), (4, 2), (6, 2)], "also between log_every"
    assert [record["loss"] is None for record in records] == [True, True, False, False]
    assert [record["grad_norm"] is None for record in records] == [True, True, False, False]
    assert [record["tokens"] for record in records] == [record["step"] * BATCH * LENGTH for record in records]
    assert "step 3: gradients were not finite; the step was skipped (2 so far)" in result["said"]
    summary = alone.summary("skips")
    assert (summary["step"], summary["skipped_steps"], summary["tokens"]) == (6, 2, 6 * BATCH * LENGTH)
    assert summary["flops"]["total"] == records[-1]["flops_total"]
    assert all(torch.isfinite(weight).all() for weight in alone.weights("skips").values())


def test_too_many_in_a_row_end_the_run(alone: Runs) -> None:
    (result,) = alone.results["fatal"]
    assert result["code"] == NON_FINITE
    assert [applied for _, _, applied, *_ in result["steps"]] == [True, False, True, False, False]
    assert "2 steps in a row, up to step 5" in result["message"]
    assert "train.nonfinite_limit" in result["message"]
    summary = alone.summary("fatal")
    assert (summary["step"], summary["skipped_steps"]) == (5, 3)
    assert [record["skipped_steps"] for record in alone.records("fatal")] == [0, 1, 1, 2, 3], "the last one too"


def test_ranks_skip_and_stop_together(together: Runs) -> None:
    for result in together.results["one rank breaks"]:
        assert result["code"] == NON_FINITE
        assert [applied for _, _, applied, *_ in result["steps"]] == [True, False, True, False, False]
        assert math.isfinite(result["steps"][2][0])


def test_a_signal_to_one_rank_stops_both_after_the_same_step(together: Runs) -> None:
    for result in together.results["one rank is asked"]:
        assert result["code"] == SIGNALLED
        assert [stop for *_, stop, _ in result["steps"]] == [False, False, True]
    checkpoints = together.folder / "one rank is asked" / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-00000003"
    assert together.records("one rank is asked")[-1]["step"] == 3


def test_a_full_disk_ends_the_run_and_harms_nothing(alone: Runs) -> None:
    (full,), (again,) = alone.results["disk full"], alone.results["room again"]
    assert full["code"] == BAD_CHECKPOINT_WRITE
    assert "step-00000002 is untouched and stays valid" in full["message"]
    assert "No space left on device" in full["message"]
    assert again["code"] == 0
    assert len(again["steps"]) == 4, "from step 2 to 6"
    assert [record["step"] for record in alone.records("full")] == [1, 2, 3, 4, 5, 6]
    assert [step[:2] for step in again["steps"][:2]] == [step[:2] for step in full["steps"][2:]]


# --- batches and precision


def test_accumulation_equals_one_large_batch(alone: Runs) -> None:
    """1e-6: the same sums in another order (1e-5 for weights, which begin at zero in part and whose Adam steps magnify it); among them a
    short window, so that micro-batches hold unequal numbers of tokens.
    """
    (large,), (small,) = alone.results["whole batch"], alone.results["two micro-batches"]
    assert [step[4] for step in large["steps"]] == [step[4] for step in small["steps"]]
    for one, two in zip(large["steps"], small["steps"], strict=True):
        assert two[:2] == pytest.approx(one[:2], rel=1e-6)
    one_weights, two_weights = alone.weights("whole batch"), alone.weights("two micro-batches")
    for name, weight in one_weights.items():
        assert torch.linalg.vector_norm(two_weights[name] - weight) <= 1e-5 * torch.linalg.vector_norm(weight), name


def test_bf16_trains_and_evaluates(alone: Runs) -> None:
    (result,) = alone.results["bf16"]
    assert result["code"] == 0
    losses = [loss for loss, *_ in result["steps"]]
    assert losses[-1] < losses[0]
    assert {weight.dtype for weight in alone.weights("bf16").values()} == {torch.bfloat16}
    evaluations = alone.records("bf16", "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [2, 4, 6]
    for record in evaluations:
        assert list(record["loss"]) == list(record["perplexity"]) == ["0", "1", "auto"]
        assert all(math.isfinite(loss) for loss in record["loss"].values())
        assert record["perplexity"]["auto"] == pytest.approx(math.exp(record["loss"]["auto"]))
        assert record["proposal_distance"] >= 0
        assert record["iterations"]["1"] == 1
    assert evaluations[-1]["loss"]["auto"] < evaluations[0]["loss"]["auto"]


# --- the record and its mirrors


def test_the_record_has_the_keys_it_promises(alone: Runs) -> None:
    records = alone.records("bf16")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert set(KEYS) <= set(record)
        assert all(isinstance(record[key], (int, float)) for key in KEYS if key != "mfu")
    assert records[0]["mfu"] is None, "no peak is known for a CPU"
    assert [record["flops_total"] for record in records] == pytest.approx(
        [sum(record["flops_step"] for record in records[: count + 1]) for count in range(6)]
    )


def test_mirrors_show_what_the_record_holds(alone: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = alone.folder / "bf16"
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (record["step"], pytest.approx(record["loss"])) for record in alone.records("bf16")
    ]
    assert [event.step for event in shown.Scalars("evaluation/loss/auto")] == [2, 4, 6]
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


# --- refusals, and a run that is done


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vocabulary", r"model\.vocabulary_size=256 is smaller than the \d+ entries"),
        ("length", r"data\.sequence_length is 8, but .* was prepared with windows for 16"),
        ("tokenizer", r"is not the tokenizer that the shards were encoded with"),
        ("nothing to validate on", r"has no split 'validation', only train\. Prepare it again with --validation"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_run_begins(alone: Runs, name: str, said: str) -> None:
    (result,) = alone.results[name]
    assert result["code"] == 2
    assert re.search(said, result["message"]), result["message"]
    assert result["there"] is None


def test_data_may_move_but_not_change(alone: Runs) -> None:
    (moved,), (changed,) = alone.results["data moved"], alone.results["data changed"]
    assert moved["code"] == 0
    assert [record["step"] for record in alone.records("moving")] == [1, 2, 3, 4, 5, 6]
    assert changed["code"] == 2
    assert "data.sequence_length: 16 in the checkpoint, 17 now" in changed["message"]
    assert [record["step"] for record in alone.records("mixing")] == [1, 2], "the record was not touched"


def test_resuming_a_finished_run_changes_nothing(alone: Runs) -> None:
    (result,) = alone.results["finished"]
    assert result["code"] == 0
    assert result["steps"] == []
    assert "All 6 steps of the run" in result["said"]
    summary = alone.summary("bf16")
    assert summary["metrics"] == alone.records("bf16")[-1]
    assert summary["evaluation"] == alone.records("bf16", "evaluations.jsonl")[-1]
    assert alone.records("bf16")[-1]["step"] == 6
    assert sorted(path.name for path in (alone.folder / "bf16" / "checkpoints").iterdir()) == ["latest", "step-00000006"]
