"""`attractor compare` at the terminal: tables that fit, one JSON document, one paragraph and code 2 for what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.pretrain.run_folders import write_manifest, write_run

DEPTHS = ("0", "1", "2", "4", "auto")


@pytest.fixture(autouse=True)
def _unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out, which take most of a comparison's time."""
    monkeypatch.setattr("pretrain.compare.plot_comparison", lambda *_: [])


def run(*arguments: object, columns: int = 100) -> Result:
    words = ["compare", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": str(columns), "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six runs with long names and the counts of large models."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_manifest(folder / "prepared")
    return [
        write_run(
            folder / f"attractor-770m-at-some-budget-{number}",
            data,
            lambda tokens, number=number: 6.0 - (1 + 0.1 * number) * tokens / 6400,  # type: ignore[misc]
            depths=DEPTHS,
            flops_a_token=1.234e19,
            seconds_a_step=123456.7,
            reached=50 if number == 5 else None,
        )
        for number in range(6)
    ]


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_and_nothing_is_cut_off(runs: list[Path], tmp_path: Path, columns: int) -> None:
    out = tmp_path / "out"
    result = run(*runs, "--out", out, "--no-evaluate", columns=columns)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if str(out) not in line]
    assert max(map(len, lines)) <= columns
    assert "…" not in result.stdout
    assert "6  attractor-770m-at-some-budget-5 (unfinished: step 50 of 100)" in lines
    head, *_ = [line for line in lines if line.strip().startswith("run  reaches")]
    assert head.split() == ["run", "reaches", "loss", "tokens", "ratio", "FLOPs", "ratio", "seconds", "ratio"]
    assert sum(line.split()[:2] == ["2", "1"] for line in lines) == 2, "a row each for validation and training"
    assert "matched within 1%: total parameters, matmul parameters, tokens, hardware FLOPs and model FLOPs" in " ".join(
        result.stdout.split()
    )


def test_json_is_one_document_and_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    result = run(*runs[:2], "--out", tmp_path / "out", "--no-evaluate", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "compare.json").read_text())


def test_refused_with_one_paragraph_and_nothing_written(runs: list[Path], tmp_path: Path) -> None:
    for arguments in ([runs[0]], [runs[0], tmp_path / "nowhere"], [runs[0], runs[0]]):
        result = run(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
