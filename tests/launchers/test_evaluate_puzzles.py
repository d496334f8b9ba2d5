"""`attractor evaluate` on runs of puzzles: what is printed, --json, pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.pretrain.reasoning.untrained_puzzle_runs import VALIDATION, prepare, write_untrained_puzzle_run


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def shown(result: Result) -> str:
    """Standard output; no line is wider than the terminal but the first, which holds paths."""
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
    assert "…" not in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("puzzles")
    sets = {game: prepare(game, folder / game) for game in ("sudoku", "maze")}
    made = {kind: write_untrained_puzzle_run(folder / kind, sets["sudoku"], kind) for kind in ("random", "trm", "transformer")}
    return made | {"mazes": write_untrained_puzzle_run(folder / "mazes", sets["maze"], "attractor")} | sets


def test_all_tables(runs: dict[str, Path]) -> None:
    words = [runs["random"], "--steps", "1,2,3,4,5,6,7", "--solver-iterations", "0,1,auto", "--breadth", "1,2", "--puzzles", "4"]
    report = document(run(*words, "--json"))
    assert report["puzzles"] == 4
    assert list(report["exact"]) == ["1", "2", "3", "4", "5", "6", "7"]
    text = shown(run(*words))
    for words_of_table in ("exact %", "rating", "halts at", "Trained on up to 3", "the head says stop", "difference", "chosen", "starts"):
        assert words_of_table in text
    assert f"{report['loss']['7']:.4f}" in text
    assert f"{report['iterations']:.2f} iterations a solve" in text


def test_mazes_are_valid_too_and_other_data_may_be_given(runs: dict[str, Path], tmp_path: Path) -> None:
    other = prepare("maze", tmp_path / "other", seed=1)
    report = document(run(runs["mazes"], "--data", other, "--json"))
    assert (report["data"], report["game"], report["puzzles"]) == (str(other), "maze 5x5", VALIDATION)
    assert "by_iterations" not in report
    assert report["loss"] != document(run(runs["mazes"], "--json"))["loss"]
    assert "shortest path %" in shown(run(runs["mazes"], "--data", other))


def test_figures_that_cannot_be_kept_are_told_all_the_same(runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "internalization.json").mkdir()  # the picture can be written, the figures cannot
    report = document(run(runs["trm"], "--internalization", "--steps", "1", "--puzzles", "2", "--out", tmp_path, "--json"))
    assert (report["puzzles"], report["files"]) == (2, [])
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize("kind", ["mazes", "trm"])
def test_internalization_is_shown_and_kept(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    words = [runs[kind], "--internalization", "--steps", "3", "--solver-iterations", "1,auto", "--out", tmp_path]
    report = document(run(*words, "--json"))
    assert json.loads((tmp_path / "internalization.json").read_text()) == report
    assert (tmp_path / "internalization.png").stat().st_size > 20_000
    assert list(report["this_step"]["exact"]) == ["0", "1", "auto"]
    assert len(report["distance"]) == 3
    assert ("iterations" in report) == (kind == "mazes")
    table = run(*words).stdout.partition(str(tmp_path))[0]
    assert max(map(len, table.splitlines()[1:])) <= 80
    assert "|z* - z0| / |z0|" in table
    assert "…" not in table


def test_pictures_are_named(runs: dict[str, Path], tmp_path: Path) -> None:
    found = document(run(runs["trm"], "--draw", "2", "--json"))
    assert [Path(file).parent for file in found["files"]] == [runs["trm"] / "pictures"] * 2
    assert all(Path(file).stat().st_size > 5_000 for file in found["files"])
    assert "rating" in run(runs["trm"], "--draw", "1", "--out", tmp_path / "there").stdout
    assert len(list((tmp_path / "there").iterdir())) == 1


def test_a_folder_with_brackets_is_shown_as_it_is(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a[bold]b"
    folder.symlink_to(runs["transformer"])
    assert f"{folder}: transformer" in run(folder, "--puzzles", "2").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trm --solvers", "--solvers belongs to language models, and RUN is a run on puzzles"),
        ("trm --tasks x --limit 3", "--tasks, --limit belong to language models"),
        ("trm --steps 0,1", "--steps 0,1 is no list of numbers from 1"),
        ("trm --breadth 2", "has one start alone (model.start=fixed)"),
        ("trm --data MAZES", "of the game maze, 5x5 (25 cells, 6 tokens)"),
        ("trm --solver-iterations strict", "Write auto"),
        ("trm --draw 1 --internalization", "2 reports: ask for one at a time"),
        ("trm --draw 1 --puzzles 2", "--puzzles does not go with --draw"),
        ("random --internalization --breadth 2", "--breadth does not go with --internalization"),
        ("trm --out OUT", "--out goes with --internalization and --draw"),
        ("transformer --steps 1,2", "it has one. Leave it out."),
        ("transformer --solver-iterations 1", "has no inner loop"),
        ("transformer --internalization", "is a Transformer: it solves nothing"),
        ("empty --steps 1", "--steps belongs to runs on puzzles, and EMPTY is not one"),
        ("empty --draw 1 --data x", "--data, --draw belong to runs on puzzles"),
    ],
)
def test_refusals(runs: dict[str, Path], words: str, said: str, tmp_path: Path) -> None:
    named = {"MAZES": runs["maze"], "OUT": tmp_path / "out"}
    first, *rest = words.split()
    folder = runs.get(first, tmp_path)
    result = run(folder, *(str(named.get(word, word)) for word in rest))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said.replace("RUN", str(folder)).replace("EMPTY", str(folder)) in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
