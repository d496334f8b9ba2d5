"""`attractor evaluate` on a real, tiny run: bits per byte beside the losses, CORE from a bundle, refusals before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.distributed.ranks import run_ranks
from tests.pretrain.downstream.core_bundles import write_bundle
from tests.pretrain.tiny_run import BATCH, LENGTH, SETTINGS, prepare_text


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the tiny run, evaluated on all its validation data."""
    folder = tmp_path_factory.mktemp("trained")
    changes = [f"train.tokens={3 * BATCH * LENGTH}", "evaluation.tokens=null", f"data.path={prepare_text(folder)}", f"run.dir={folder}/run"]
    (ended,) = run_ranks("tests.pretrain.trainer_ranks:runs", 1, [{"overrides": [*SETTINGS, *changes]}])
    assert ended[0]["code"] == 0, ended[0]["message"]
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_bits_per_byte_stand_beside_the_losses_here_and_in_the_record_of_training(trained: Path) -> None:
    report = document(run(str(trained), "--json"))
    assert list(report["bits_per_byte"]) == list(report["loss"]) == ["0", "1", "auto"]
    recorded = json.loads((trained / "evaluations.jsonl").read_text().splitlines()[-1])
    for depth, bits in report["bits_per_byte"].items():
        assert 0 < bits < 8.5  # untrained, over 300 entries, few of them longer than a byte
        assert recorded["bits_per_byte"][depth] == pytest.approx(bits, rel=1e-5)
    shown = run(str(trained)).stdout
    assert "bits per byte" in shown
    assert f"{report['bits_per_byte']['auto']:.4f}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_core_is_shown_and_kept_in_the_run_folder(trained: Path, bundle: Path) -> None:
    report = document(run(str(trained), "--core", str(bundle), "--json"))
    assert [task["label"] for task in report["tasks"]] == ["pick", "fit", "tell"]
    assert report["core"] == pytest.approx(sum(task["centred"] for task in report["tasks"]) / 3)
    assert (report["depth"], report["step"], report["max_per_task"]) == ("auto", 3, None)
    assert json.loads((trained / "core.json").read_text()) == report
    shown = run(str(trained), "--core", str(bundle), "--max-per-task", "3", "--solver-iterations", "0")
    assert "depth 0, at most 3 examples a task" in " ".join(shown.stdout.split())
    assert f"{json.loads((trained / 'core.json').read_text())['core']:.4f}" in shown.stdout
    assert "Cut on the left" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-per-task", "5"], "--max-per-task goes with --core, which is not given"),
        (["--core", "BUNDLE", "--solvers"], "--solvers and --core are 2 reports: ask for one at a time"),
        (["--limit", "5"], "--limit goes with --tasks and --internalization, which is not given"),
        (["--core", "BUNDLE", "--through", "hf"], "--through goes with --tasks"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "local_blimp", "--solver-iterations", "0,1"], "--tasks asks at one depth, and --solver-iterations 0,1 names 2"),
        (["--internalization"], "There is no run in"),
        (["--core", "BUNDLE", "--solver-iterations", "0,auto"], "names 2"),
        (["--core", "nowhere"], "nowhere/core.yaml cannot be read"),
        (["--core", "BUNDLE", "--max-per-task", "2"], "at least 3"),
        (["--core", "BUNDLE"], "There is no run in"),
    ],
)
def test_refusals(tmp_path: Path, bundle: Path, words: list[str], said: str) -> None:
    result = run(str(tmp_path), *(str(bundle) if word == "BUNDLE" else word for word in words))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
