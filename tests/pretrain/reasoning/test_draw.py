"""Pictures of puzzles: which there are, that their colours say what is right, and the titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from numpy.typing import NDArray

from data_pipeline.puzzles import PuzzleSet
from pretrain.errors import Refusal
from pretrain.reasoning import draw
from pretrain.reasoning.draw import draw_puzzles
from tests.pretrain.reasoning.untrained_puzzle_runs import prepare, write_untrained_puzzle_run

PINK, RED, ORANGE, GREY = draw._PINK, draw._RED, draw._ORANGE, draw._GREY


def pixels(file: Path | str, colour: tuple[float, float, float]) -> int:
    """How many there are of a colour in the panels of a picture; the legend is cut off."""
    whole: NDArray[np.float32] = image.imread(file)[:, :, :3]
    panels = whole[: int(0.85 * len(whole))]
    return int((np.abs(panels - np.array(colour)) < 0.01).all(-1).sum())


def test_a_run_is_drawn_step_by_step(tmp_path: Path) -> None:
    data = prepare("maze", tmp_path / "maze")
    run = write_untrained_puzzle_run(tmp_path / "run", data, "trm")
    seen: list[float] = []
    found = draw_puzzles(run, tmp_path / "pictures", 2, progress=seen.append)
    assert [Path(file).name for file in found["files"]] == ["maze-000000.png", "maze-000004.png"]
    assert [puzzle["row"] for puzzle in found["puzzles"]] == [0, 4]
    assert found["puzzles"][1]["rating"] == int(PuzzleSet(data).ratings[4])
    assert seen == [0.5, 1.0]
    for file in found["files"]:
        assert pixels(file, RED) > 500  # untrained
    wide = image.imread(found["files"][0]).shape[1]
    narrow = image.imread(draw_puzzles(run, tmp_path / "one", 1, steps=[1])["files"][0]).shape[1]
    assert narrow * 4 == wide * 3  # puzzle, steps 1 and 2 of 3, answer; puzzle, step 1, answer
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be written"):
        draw_puzzles(run, tmp_path / "file", 1)


@pytest.mark.parametrize("game", ["sudoku", "maze"])
def test_colours_tell_right_from_wrong(game: str, tmp_path: Path) -> None:
    puzzles = PuzzleSet(prepare(game, tmp_path / "set"))
    puzzle, answer = puzzles.inputs[0].numpy(), puzzles.answers[0].numpy()
    wrong = RED if game == "maze" else PINK

    def drawn(name: str, grid: NDArray[np.uint8]) -> Path:
        draw._write(tmp_path / name, "title", puzzle, [grid], answer, [1], puzzles.manifest)
        return tmp_path / name

    right = drawn("right.png", answer)
    assert pixels(right, wrong) == 0
    assert pixels(right, GREY if game == "sudoku" else draw._BLACK) > 1000
    other = answer.copy()
    place = int(np.flatnonzero(answer == 2)[0])  # an open cell, or the digit 1
    other[place] = 5 if game == "maze" else 3
    one = pixels(drawn("one.png", other), wrong)
    assert one > 500
    other[int(np.flatnonzero(answer == 2)[1])] = other[place]
    assert 1.5 * one < pixels(drawn("two.png", other), wrong) < 2.5 * one
    if game == "maze":
        assert pixels(right, ORANGE) == 0
        assert pixels(drawn("missing.png", puzzle.copy()), ORANGE) > 500
