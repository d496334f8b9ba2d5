"""`attractor export`: what it prints, as a table and as JSON, and what it refuses before it looks at anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.pretrain.tiny_run import prepare_text
from tests.pretrain.untrained_runs import STEP, write_untrained_run


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    return write_untrained_run(folder / "run", prepare_text(folder / "data"))


def test_the_table_says_what_was_exported_and_how_to_load_it(untrained: Path, tmp_path: Path) -> None:
    done = run(str(untrained), "--out", str(tmp_path / "out"), "--solver-iterations", "4")
    assert done.exit_code == 0, done.stderr
    for told in (f"step {STEP}", "AttractorForCausalLM", "solver iterations   4", "trust_remote_code=True", "attractor generate"):
        assert told in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["solver_iterations"] == 4


def test_json_is_one_document(untrained: Path, tmp_path: Path) -> None:
    done = run(str(untrained), "--out", str(tmp_path / "out"), "--plain", "--solver-iterations", "0", "--json")
    report = json.loads(done.stdout)
    assert (report["class"], report["code_free"], report["step"]) == ("ApertusForCausalLM", True, STEP)
    assert list(report["logit_difference"]) == ["0"]


def test_refusals_are_one_paragraph_and_leave_nothing(untrained: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([str(untrained), "--solver-iterations", "deep"], "neither auto nor a number"),
        ([str(untrained), "--plain"], "Add --solver-iterations 0"),
        ([str(tmp_path)], "There is no run in"),
    ):
        done = run(*arguments, "--out", str(tmp_path / "out"))
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
        assert done.stderr.strip().count("\n") <= 6
        assert list(tmp_path.iterdir()) == []
