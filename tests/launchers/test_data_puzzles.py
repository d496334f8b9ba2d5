"""`attractor data` on puzzles, as a user would type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_from_nothing_to_a_set(tmp_path: Path) -> None:
    done = run("prepare", "sudoku", "--size", 4, "--puzzles", 30, "--validation", 10, "--out", tmp_path / "set")
    assert done.exit_code == 0, done.stderr
    assert "sudoku 4 x 4, vocabulary 6" in done.stdout
    assert "data.path=" in done.stdout
    verified = run("verify", tmp_path / "set")
    assert "40 puzzles in train, validation; each has one solution" in verified.stdout
    counted = run("stats", tmp_path / "set")
    for told in ("Rating, by quantile", "Clues, by quantile", "guesses of our solver"):
        assert told in counted.stdout
    tables = [line for line in (done.stdout + counted.stdout).splitlines() if str(tmp_path) not in line]
    assert max(map(len, tables)) <= 80
    again = run("prepare", "sudoku", "--out", tmp_path / "set")
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)


def test_json_is_one_document(tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = ["prepare", "maze", "--size", 7, "--min-rating", 9, "--puzzles", 20, "--seed", 3, "--out", out, "--json"]
    manifest = json.loads(run(*words).stdout)
    assert (manifest["game"], manifest["splits"]["train"]["puzzles"], manifest["splits"]["validation"]["puzzles"]) == ("maze", 20, 2)
    assert manifest["splits"]["train"]["ratings"]["least"] >= 9
    assert json.loads(run("verify", out, "--json").stdout)["puzzles"] == 22
    assert json.loads(run("stats", out, "--json").stdout)["given"] == "walls"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sodoku"], "Did you mean sudoku?"),
        (["mazes:x"], "Did you mean maze?"),
        (["sudoku", "--vocab-size", "300"], "--vocab-size is an option for text"),
        (["python-docs", "--puzzles", "5"], "--puzzles is an option for puzzles"),
        (["sudoku", "--size", "5"], "There is no Sudoku of size 5"),
        (["maze", "--size", "3"], "A maze of size 3"),
        (["sudoku", "python-docs"], "cannot be mixed"),
        (["sudoku:nowhere.csv"], "does not exist"),
        (["sudoku", "--validation", "nope"], "neither a share"),
    ],
)
def test_what_cannot_be_is_refused_in_a_paragraph(words: list[str], told: str, tmp_path: Path) -> None:
    done = run("prepare", *words, "--out", tmp_path / "set")
    assert done.exit_code == 2
    assert told in done.stderr
    assert not list(tmp_path.iterdir())
