"""`attractor compare` of puzzle runs at the terminal: tables that fit, one JSON document, one paragraph for what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.pretrain.reasoning.puzzle_folders import write_puzzle_manifest, write_puzzle_run
from tests.pretrain.run_folders import write_manifest, write_run


@pytest.fixture(autouse=True)
def _unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.reasoning.compare.plot_puzzles", lambda *_: [])


def run(*arguments: object) -> Result:
    words = ["compare", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two arms of two seeds at the costs of large runs."""
    data = write_puzzle_manifest(tmp_path / "prepared")
    return [
        write_puzzle_run(
            tmp_path / f"maze-attractor-of-some-width-{width}" / f"seed={seed}",
            data,
            lambda step, seed=seed: (step + seed) / 101,  # type: ignore[misc]
            ["model.kind=attractor", "gradient.mode=phantom", f"model.width={width}", f"train.seed={seed}"],
            flops_a_step=1.234e19,
            seconds_a_step=12345.6,
            iterations=12.345,
            valid=True,
        )
        for width in (32, 64)
        for seed in (0, 1)
    ]


def test_tables_fit_and_nothing_is_cut_off(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*runs, "--out", out, "--accuracy", "0.8")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if str(out) not in line]
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout
    assert lines[:2] == ["1  maze-attractor-of-some-width-32: attractor", "2  maze-attractor-of-some-width-64: attractor"]
    assert sum(line.split()[:2] == ["1", "2"] and "99.5 ± 0.7" in line for line in lines) == 1
    assert "evaluation with 80 % exact" in " ".join(result.stdout.split())


def test_the_longest_kind_is_not_cut_off(runs: list[Path], tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    plain = ["model.kind=transformer", "supervision.steps=1"]
    other = write_puzzle_run(tmp_path / "plain", data, lambda _: 0.5, plain, flops_a_step=1.234e19, seconds_a_step=12345.6, valid=True)
    result = run(*runs, other, "--out", tmp_path / "out", "--accuracy", "0.005")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert "3  plain: transformer" in result.stdout
    assert "evaluation with 0.5 % exact" in " ".join(result.stdout.split())


def test_json_is_one_document_and_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    result = run(*runs, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "compare.json").read_text())


def test_refused_with_one_paragraph_and_nothing_written(runs: list[Path], tmp_path: Path) -> None:
    text = [write_run(tmp_path / name, write_manifest(tmp_path / f"text-{name}"), lambda _: 5.0) for name in "ab"]
    for arguments in ([runs[0], text[0]], [runs[0], tmp_path / "nowhere"], [*text, "--accuracy", "0.5"]):
        result = run(*arguments, "--out", tmp_path / "out")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for two in (runs[:2], text):
        result = run(*two, "--out", tmp_path / "file/out", "--no-evaluate")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "cannot be made" in result.stderr
