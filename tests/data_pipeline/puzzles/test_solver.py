"""The solver against an independent one that only tries, and against the genuine answers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.puzzles.checks import sudoku_valid
from data_pipeline.puzzles.games import BLANK, board_of
from data_pipeline.puzzles.readers import read_puzzles
from data_pipeline.puzzles.sampling import batches
from data_pipeline.puzzles.solver import solve
from tests.data_pipeline.puzzles.genuine import SUDOKU, TDOKU, needs_sudoku, needs_tdoku


def solutions(grid: list[int], height: int, width: int, most: int) -> list[list[int]]:
    """Up to `most` solutions of one grid of tokens, by trying every digit in the blank with the fewest that fit."""
    size = height * width
    fits: dict[int, list[int]] = {}
    for cell, own in enumerate(grid):
        row, column = divmod(cell, size)
        seen = {
            token
            for other, token in enumerate(grid)
            if other != cell
            and (
                other // size == row
                or other % size == column
                or (other // size // height == row // height and other % size // width == column // width)
            )
        }
        if own in seen - {BLANK}:
            return []
        if own == BLANK:
            fits[cell] = [token for token in range(2, size + 2) if token not in seen]
    if not fits:
        return [grid]
    cell = min(fits, key=lambda cell: len(fits[cell]))
    found: list[list[int]] = []
    for token in fits[cell]:
        found += solutions([*grid[:cell], token, *grid[cell + 1 :]], height, width, most - len(found))
        if len(found) >= most:
            break
    return found


def weakened(inputs: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Puzzles with one clue less each."""
    random = np.random.default_rng(seed)
    inputs = inputs.copy()
    for row in inputs:
        row[random.choice(np.flatnonzero(row != BLANK))] = BLANK
    return inputs


@pytest.mark.parametrize("size", [4, 6, 9])
def test_solutions_are_counted_and_found_as_by_trying(size: int) -> None:
    board = board_of("sudoku", size)
    assert board.box is not None
    puzzles = next(batches(board, 1, 0)).take(slice(2 if size == 9 else 6))
    inputs = np.concatenate([puzzles.inputs, weakened(puzzles.inputs, 0), puzzles.inputs])
    inputs[2 * len(puzzles) :, np.flatnonzero(puzzles.inputs[0] != BLANK)[0]] = 2  # some of these have no solution
    solved = solve(inputs, board.box)
    assert (solved.solutions[: len(puzzles)] == 1).all()
    for row, tokens in enumerate(inputs.tolist()):
        expected = solutions(tokens, *board.box, most=2)
        assert min(2, solved.solutions[row]) == len(expected)
        if len(expected) == 1:
            assert solved.answers[row].tolist() == expected[0]


def test_an_empty_grid_and_one_that_contradicts_itself() -> None:
    blank = np.full(81, BLANK, np.uint8)
    twice = blank.copy()
    twice[:2] = 5
    solved = solve(np.stack([blank, twice]), (3, 3))
    assert solved.solutions[0] >= 2
    assert solved.solutions[1] == 0
    assert sudoku_valid(solved.answers, (3, 3)).tolist() == [True, False]


def test_nothing_to_solve() -> None:
    assert len(solve(np.empty((0, 81), np.uint8), (3, 3)).solutions) == 0


@needs_sudoku
def test_genuine_puzzles_and_their_company() -> None:
    """The answers are the published ones; ratings do not depend on what a puzzle is solved with, and grow with the published ones."""
    rows = read_puzzles("sudoku", SUDOKU)
    assert rows is not None
    assert rows.ratings is not None
    solved = solve(rows.inputs[:300], (3, 3))
    assert (solved.solutions == 1).all()
    assert (solved.answers == rows.answers[:300]).all()
    assert np.corrcoef(solved.ratings, rows.ratings[:300])[0, 1] > 0.4
    alone = solve(rows.inputs[70:80][::-1], (3, 3))
    assert (alone.ratings[::-1] == solved.ratings[70:80]).all()


@needs_tdoku
def test_genuine_hard_puzzles() -> None:
    rows = read_puzzles("sudoku", TDOKU, "validation")
    assert rows is not None
    solved = solve(rows.inputs[::25], (3, 3))
    assert (solved.solutions == 1).all()
    assert (solved.answers == rows.answers[::25]).all()


def test_validity_of_grids() -> None:
    board = board_of("sudoku", 6)
    assert board.box is not None
    right = next(batches(board, 0, 0)).answers[:3]
    assert sudoku_valid(right, board.box).all()
    swapped = right.copy()
    swapped[:, [0, 7]] = swapped[:, [7, 0]]
    foreign = np.where(right == 7, 8, right)
    assert not sudoku_valid(np.concatenate([swapped, foreign, np.where(right == 2, 1, right), right * 0]), board.box).any()
    boxes_broken = np.stack([np.roll(np.arange(2, 8), shift) for shift in range(6)]).reshape(1, 36)  # rows and columns are right
    assert not sudoku_valid(boxes_broken, board.box).any()
