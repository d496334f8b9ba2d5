"""Symmetries: they keep puzzles valid and solved, reach what they should, and are a function of their key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.puzzles.augment import augment, dihedral
from data_pipeline.puzzles.checks import maze_valid_and_shortest, sudoku_valid
from data_pipeline.puzzles.classes import class_keys
from data_pipeline.puzzles.games import BLANK, board_of
from data_pipeline.puzzles.sampling import batches
from data_pipeline.puzzles.solver import solve

SUDOKUS = {size: next(batches(board_of("sudoku", size), 5, 0)).take(slice(40)) for size in (4, 6, 9)}
MAZES = next(batches(board_of("maze", 9), 5, 12)).take(slice(40))
keys = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))


@given(st.sampled_from([4, 6, 9]), keys)
@settings(max_examples=25, deadline=None)
def test_a_sudoku_stays_one_with_one_solution(size: int, key: tuple[int, int, int]) -> None:
    board, puzzles, (seed, epoch, first) = board_of("sudoku", size), SUDOKUS[size], key
    assert board.box is not None
    rows = len(puzzles)
    inputs, answers = augment(board, puzzles.inputs, puzzles.answers, seed, np.full(rows, epoch), first + np.arange(rows))
    assert sudoku_valid(answers, board.box).all()
    solved = solve(inputs, board.box)
    assert (solved.solutions == 1).all()
    assert (solved.answers == answers).all()
    assert ((inputs != BLANK).sum(1) == (puzzles.inputs != BLANK).sum(1)).all()
    assert (class_keys(board, inputs, answers) == class_keys(board, puzzles.inputs, puzzles.answers)).all()


@given(keys)
@settings(max_examples=25, deadline=None)
def test_a_maze_stays_solved(key: tuple[int, int, int]) -> None:
    board, (seed, epoch, first) = board_of("maze", 9), key
    inputs, answers = augment(board, MAZES.inputs, MAZES.answers, seed, np.full(len(MAZES), epoch), first + np.arange(len(MAZES)))
    assert maze_valid_and_shortest(inputs, answers, 9).all()
    assert (class_keys(board, inputs, answers) == class_keys(board, MAZES.inputs, MAZES.answers)).all()


def test_each_row_depends_on_its_own_key_alone() -> None:
    board, puzzles = board_of("sudoku", 9), SUDOKUS[9]
    epoch, index = np.arange(40) % 3, np.arange(40)
    together, _ = augment(board, puzzles.inputs, puzzles.answers, 7, epoch, index)
    some = puzzles.take(np.array([30, 4]))
    apart, _ = augment(board, some.inputs, some.answers, 7, epoch[[30, 4]], index[[30, 4]])
    assert (apart == together[[30, 4]]).all()
    others = [augment(board, puzzles.inputs, puzzles.answers, seed, epoch + more, index)[0] for seed, more in ((8, 0), (7, 1))]
    assert all((other != together).any(1).all() for other in others)


def test_the_draws_are_the_same_on_every_machine_and_version() -> None:
    """A resumed run depends on these numbers: a change of them is a change of format."""
    grid = np.arange(16, dtype=np.uint8)[None] % 4 + 2
    found, _ = augment(board_of("sudoku", 4), grid, grid, 1, np.array([2]), np.array([3]))
    assert found[0].tolist() == [
        5,
        5,
        5,
        5,
        3,
        3,
        3,
        3,
        2,
        2,
        2,
        2,
        4,
        4,
        4,
        4,
    ]


@pytest.mark.parametrize(("size", "turned"), [(4, 0.5), (6, 0.0), (9, 0.5)])
def test_transposition_only_where_boxes_are_square(size: int, turned: float) -> None:
    """A grid whose cells of one row share a token: after a symmetry the token fills a row, or a column if transposed."""
    board, count = board_of("sudoku", size), 400
    grid = np.repeat(np.arange(size, dtype=np.uint8) + 2, size)[None].repeat(count, 0)
    found, _ = augment(board, grid, grid, 0, np.zeros(count, np.int64), np.arange(count))
    columns = (found.reshape(count, size, size) == found.reshape(count, size, size)[:, :1]).all((1, 2))
    assert abs(columns.mean() - turned) < 0.1


def test_every_line_goes_everywhere() -> None:
    """Over many draws the first row of 2x3 boxes lands in every row, with equal chance, and digits on every digit."""
    board, count = board_of("sudoku", 6), 3000
    grid = np.repeat(np.arange(6, dtype=np.uint8) + 2, 6)[None].repeat(count, 0)
    mask = np.where(grid == 2, 2, BLANK).astype(np.uint8)
    inputs, _ = augment(board, mask, grid, 0, np.zeros(count, np.int64), np.arange(count))
    row = (inputs != BLANK).argmax(1) // 6
    digit = inputs.max(1)
    for found in (np.bincount(row, minlength=6), np.bincount(digit - 2, minlength=6)):
        assert (abs(found / count - 1 / 6) < 0.03).all()


def test_the_eight_symmetries_of_the_square() -> None:
    maps = dihedral(4)
    assert len({tuple(view) for view in maps.tolist()}) == 8
    assert maps[0].tolist() == list(range(16))
    products = {tuple(one[other]) for one in maps for other in maps}
    assert products == {tuple(view) for view in maps}  # a group


def test_different_puzzles_have_different_keys() -> None:
    board = board_of("sudoku", 9)
    puzzles = SUDOKUS[9]
    assert len(set(class_keys(board, puzzles.inputs, puzzles.answers).tolist())) == len(puzzles)
    fewer = puzzles.inputs.copy()
    for row in fewer:
        row[np.flatnonzero(row != BLANK)[0]] = BLANK
    assert not np.isin(class_keys(board, fewer, puzzles.answers), class_keys(board, puzzles.inputs, puzzles.answers)).any()
