"""Puzzles out of nothing: batches of candidates, each a function of (seed, number of the batch), of which those that will do are kept.

Maze, the published sampler: the cells are shuffled; a number of walls uniform between 30 % and 50 % of them comes first, start and goal are
the next two; kept is what has a path of at least `least` steps. At 30 x 30 that is 109 steps, 110 cells with both ends.

Sudoku: two boxes that share no row and column (three of 9x9) are filled at random, the solver completes the grid, and a random symmetry
(augment.py) is applied. Then the digits are taken out one by one, in random order, wherever the puzzle still has one solution: where no
solution has another digit there. What is left is minimal: no clue can go. 4x4 has only 36 minimal puzzles up to symmetry, so there the
taking stops at a number of clues drawn from 4 to 8.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.augment import augment
from data_pipeline.puzzles.draws import draws, permutations
from data_pipeline.puzzles.games import BLANK, GOAL, OPEN, START, SUDOKU, WALL, Board
from data_pipeline.puzzles.mazes import apart
from data_pipeline.puzzles.mazes import solve as solve_mazes
from data_pipeline.puzzles.shards import Puzzles
from data_pipeline.puzzles.solver import masks_of, search, solve

MAZES, SUDOKUS = 1 << 14, 1 << 10  # candidates of a batch
SHUFFLED = 256  # mazes at once: their random numbers stay in a core's cache
CLUES = {4: (4, 8)}  # size -> fewest and most clues to stop at; other sizes go on until the puzzle is minimal

_MAZE, _GRID, _ORDER = 2, 3, 4  # purposes of random numbers (augment.py has 1)
_CELL_BITS = np.uint64(12)  # a cell's number, beside 52 random bits


def default_least(board: Board) -> int:
    """The rating that a generated puzzle has at least, unless told: 0 for a Sudoku; for a maze the published 109 steps at side 30, and
    twice the side elsewhere, more than any detour-free path has.
    """
    if board.game == SUDOKU:
        return 0
    return 109 if board.size == 30 else 2 * board.size


def batches(board: Board, seed: int, least: int) -> Iterator[Puzzles]:
    """An endless row of batches of puzzles with ratings of at least `least`; a batch may be empty."""
    make = _sudokus if board.game == SUDOKU else _mazes
    number = 0
    while True:
        puzzles = make(board, seed, number, least)
        yield puzzles.take(puzzles.ratings >= least)
        number += 1


def _mazes(board: Board, seed: int, number: int, least: int) -> Puzzles:
    kept = []
    for first in range(number * MAZES, (number + 1) * MAZES, SHUFFLED):
        inputs = maze_candidates(board, seed, np.arange(first, first + SHUFFLED))
        kept.append(inputs[apart(inputs != WALL, (inputs == START).argmax(1), (inputs == GOAL).argmax(1), board.size, least)])
    answers, steps = solve_mazes(found := np.concatenate(kept), board.size)
    return Puzzles(found, answers, np.zeros(len(found), np.int64), steps.astype(np.int32))


def maze_candidates(board: Board, seed: int, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The mazes [n, cells] that the sampler draws as candidates `numbers` [n], solvable or not."""
    cells, rows = board.cells, np.arange(len(numbers))
    fewest, most = round(0.3 * cells), round(0.5 * cells)
    random = draws(cells + 1, _MAZE, seed, numbers)
    walls = (fewest + random[:, -1] % np.uint64(most - fewest + 1)).astype(np.int64)
    shuffled = random[:, :-1] << _CELL_BITS | np.arange(cells, dtype=np.uint64)
    shuffled.sort(axis=1)  # several times as fast as an argsort
    shuffled &= (np.uint64(1) << _CELL_BITS) - np.uint64(1)
    kinds = np.where(np.arange(cells) < walls[:, None], WALL, OPEN).astype(np.uint8)
    kinds[rows, walls], kinds[rows, walls + 1] = START, GOAL
    inputs = np.empty((len(numbers), cells), np.uint8)
    np.put_along_axis(inputs, shuffled.astype(np.intp), kinds, 1)
    return inputs


def _sudokus(board: Board, seed: int, number: int, least: int) -> Puzzles:
    assert board.box is not None
    numbers = np.arange(number * SUDOKUS, (number + 1) * SUDOKUS)
    answers, numbers = sudoku_grids(board, seed, numbers)
    inputs = _dug(board, answers, seed, numbers)
    ratings = solve(inputs, board.box).ratings
    return Puzzles(inputs, answers, np.zeros(len(inputs), np.int64), ratings)


def sudoku_grids(board: Board, seed: int, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Full grids [m, cells], and those m of the `numbers` [n] that they belong to: some random boxes of 4x4 and 6x6 have no completion."""
    assert board.box is not None
    size, (height, width) = board.size, board.box
    boxes = min(size // height, size // width)
    random = permutations(draws(boxes * size, _GRID, seed, numbers).reshape(-1, boxes, size)) + BLANK + 1
    grids = np.full((len(numbers), size // height, height, size // width, width), BLANK, np.uint8)
    for box in range(boxes):
        grids[:, box, :, box] = random[:, box].reshape(-1, height, width)
    solved = solve(grids.reshape(-1, board.cells), board.box, limit=1)
    full, numbers = solved.answers[solved.solutions > 0], numbers[solved.solutions > 0]
    return augment(board, full, full, seed, np.full(len(full), -1), numbers)[1], numbers


def _dug(board: Board, answers: NDArray[np.uint8], seed: int, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Puzzles [n, cells] with these unique solutions."""
    assert board.box is not None
    random = draws(board.cells + 1, _ORDER, seed, numbers)
    order = permutations(random[:, 1:])
    fewest, most = CLUES.get(board.size, (0, 0))
    enough = (fewest + random[:, 0] % np.uint64(most - fewest + 1)).astype(np.int64)
    inputs = answers.copy()
    every = (1 << board.size) - 1
    for turn in range(board.cells):
        rows = np.flatnonzero((inputs != BLANK).sum(1) > enough)
        cells = order[rows, turn]
        boards = masks_of(inputs[rows], board.box)
        flat = boards.reshape(board.cells, len(rows))
        flat[cells, np.arange(len(rows))] ^= every  # all digits but the one that is there
        free = search(boards, board.box, 1).solutions == 0
        inputs[rows[free], cells[free]] = BLANK
    return inputs
