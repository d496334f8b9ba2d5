"""A run that is interrupted and resumed is the run that was not: samples, losses, norms, weights, ledger, bit for bit.

Also what only real processes show: kill -9 while training and while saving, then --resume.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.plan import make_plan
from model.cost import planned
from pretrain.config import Recipe
from pretrain.matching import run_flops
from pretrain.measured import measured
from tests.distributed.ranks import ROOT, free_port, rank_environment, run_ranks
from tests.pretrain.tiny_run import SETTINGS, STEPS, TARGET, golden_losses


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, run_ranks(TARGET, 1, str(run), str(data), [], False, SETTINGS)[0]


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine says."""
    unlike = ("tokens_per_second", "step_seconds", "memory_bytes", "mfu")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in unlike} for line in lines]


def test_the_whole_run_has_every_step_once(whole: tuple[Path, dict[str, Any]]) -> None:
    run, result = whole
    assert [step for step, *_ in result["seen"]] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    assert result["checkpoint"] == f"step-{STEPS:08d}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == STEPS * 4 * 16
    assert summary["flops"]["total"] == pytest.approx(sum(record["flops_step"] for record in records(run)), rel=1e-12)
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluations] == [7, 14, 20]
    assert list(evaluations[0]["loss"]) == ["0", "1", "auto"]


def test_golden_losses(whole: tuple[Path, dict[str, Any]]) -> None:
    """1e-3 and not equality: kernels of another CPU round otherwise (1e-7), twenty steps of Muon and AdamW magnify it, and a solve may
    stop one evaluation earlier or later. A change of the mathematics moves the losses by far more.
    """
    assert [loss for _, _, loss, _ in whole[1]["seen"]] == pytest.approx(golden_losses(), rel=1e-3)


@pytest.mark.parametrize("stops", [[10], [7, 13]], ids=["10+10", "7+6+7"])
def test_interrupted_equals_whole(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, stops: list[int]) -> None:
    run, seen = tmp_path / "run", []
    for part, stop in enumerate([*stops, None]):
        result = run_ranks(TARGET, 1, str(run), str(data), [stop] if stop else [], part > 0, SETTINGS)[0]
        assert result["code"] == (3 if stop else 0)
        seen += result["seen"]
    assert seen == whole[1]["seen"]
    assert result["weights"] == whole[1]["weights"]
    assert records(run) == records(whole[0])
    totals = [json.loads((folder / "summary.json").read_text())["flops"] for folder in (run, whole[0])]
    assert totals[0] == totals[1]


KINDS: dict[str, list[str]] = {
    "parcae": ["model.kind=parcae", "model.backbone_layers=3", "loop.core=1", "loop.coda=1", "model.value_embeddings=true"],
    "looped": ["model.kind=looped", "loop.core=1", "loop.coda=0", "loop.iterations=3"],
    "deq": ["model.kind=deq", "model.tied_embeddings=false", "gradient.mode=adjoint"],
    "transformer": ["model.kind=transformer"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resumes_exactly_and_its_ledger_is_the_plan_s(kind: str, data: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, *KINDS[kind]]
    straight = run_ranks(TARGET, 1, str(tmp_path / "a"), str(data), [], False, settings)[0]
    parts = [run_ranks(TARGET, 1, str(tmp_path / "b"), str(data), stop, bool(n), settings)[0] for n, stop in enumerate(([10], []))]
    assert [step for part in parts for step in part["seen"]] == straight["seen"]
    assert parts[-1]["weights"] == straight["weights"]
    assert records(tmp_path / "b") == records(tmp_path / "a")
    flops = json.loads((tmp_path / "b" / "summary.json").read_text())["flops"]
    assert flops["total"] == pytest.approx(sum(record["flops_step"] for record in records(tmp_path / "b")), rel=1e-12)
    recipe = Recipe.from_yaml((tmp_path / "b" / "config.yaml").read_text())
    work = planned(recipe.architecture) if kind == "transformer" else measured(tmp_path / "b").for_recipe(recipe)
    assert run_flops(recipe, recipe.train.tokens, work) == pytest.approx(flops["model"], rel=1e-9)
    if kind in ("transformer", "looped"):  # nothing to measure: the plan knows beforehand
        assert make_plan(recipe).run_flops == pytest.approx(flops["model"], rel=1e-9)


def test_two_ranks_resume_exactly(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "layout.zero=3"]
    straight = run_ranks(TARGET, 2, str(tmp_path / "a"), str(data), [], False, settings)
    first = run_ranks(TARGET, 2, str(tmp_path / "b"), str(data), [9], False, settings)
    second = run_ranks(TARGET, 2, str(tmp_path / "b"), str(data), [], True, settings)
    for rank in range(2):
        assert first[rank]["code"] == 3
        assert first[rank]["seen"] + second[rank]["seen"] == straight[rank]["seen"]
    assert second[0]["weights"] == straight[0]["weights"]
    ids = [sorted(a[1] + b[1]) for a, b in zip(*(rank["seen"] for rank in straight), strict=True)]
    assert ids == [sorted(step[1]) for step in whole[1]["seen"]], "two ranks of 2 see what one rank of 4 sees"


def start(run: Path, data: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), "demo", f"data.path={data}", f"run.dir={run}", *SETTINGS]
    environment = rank_environment(0, 1, free_port())
    return subprocess.Popen(
        [*command, "checkpoint.every=2", *extra], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_kill_minus_nine_then_resume(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    process = start(run, data)
    deadline = time.monotonic() + 120
    partial = run / "checkpoints" / ".step-00000006.partial"
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if moment == "training" and metrics.exists() and metrics.read_text().count("\n") >= 7:
            break
        if moment == "saving" and partial.exists():
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read() if process.stdout else ""
    resumed = start(run, data, "--resume")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert records(run) == records(whole[0])
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    other = whole[0] / "checkpoints" / f"step-{STEPS:08d}"
    assert (newest / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert (newest / "average.safetensors").read_bytes() == (other / "average.safetensors").read_bytes()


def test_sigterm_saves_and_exits_with_its_own_code(data: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", data, "train.tokens=1e7")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert step == records(tmp_path / "run")[-1]["step"]
    assert "--resume" in output
