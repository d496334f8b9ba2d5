"""Symmetries of the games, drawn for each puzzle anew from (seed, epoch, index) and applied to all puzzles of a batch at once.

Sudoku, boxes h x w: the digits are renamed; bands (h rows) are permuted, and the rows within each band; stacks (w columns), and the columns
within each; and the grid is transposed with probability 1/2, only where h = w, because a transposed grid of 2x3 boxes has 3x2 boxes. All of
them map puzzles with one solution to puzzles with one solution (9x9: 9! 6^8 2 = 1.2e12 of them).

Maze: one of the eight symmetries of the square. The answer is transformed with the maze, as published: it is still a shortest path, but
need not be the one that the label rule (mazes.py) would choose in the transformed maze, because that rule prefers directions.

Nothing is stored: the published 1,000 augmentations of each puzzle need no disk. A draw is 64 bits of draws.py; modulo a small number its
bias is below 2^-60.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.draws import draws, permutations
from data_pipeline.puzzles.games import BLANK, SUDOKU, Board

_PURPOSE = 1  # of the random numbers: no other user of draws.py shares a stream with this one

Grids = NDArray[np.uint8]


def augment(board: Board, inputs: Grids, answers: Grids, seed: int, epoch: NDArray, index: NDArray) -> tuple[Grids, Grids]:
    """(inputs, answers), each [n, cells], transformed alike; row i by the symmetry that belongs to (seed, epoch[i], index[i])."""
    change = _sudoku if board.game == SUDOKU else _maze
    return change(board, inputs, answers, seed, epoch, index)


def _sudoku(board: Board, inputs: Grids, answers: Grids, seed: int, epoch: NDArray, index: NDArray) -> tuple[Grids, Grids]:
    assert board.box is not None
    size, (height, width) = board.size, board.box
    lines = 2 * size + size // height + size // width
    numbers = draws(size + lines + 1, _PURPOSE, seed, epoch, index)
    digits = np.zeros((len(inputs), size + 2), np.uint8)  # token -> token
    digits[:, BLANK] = BLANK
    digits[:, BLANK + 1 :] = permutations(numbers[:, :size]) + BLANK + 1
    rows = _lines(numbers[:, size:], size, height)
    columns = _lines(numbers[:, 2 * size + size // height :], size, width)
    cells = rows[:, :, None] * size + columns[:, None, :]  # [n, size, size]: where each new cell comes from
    if height == width:
        turned = numbers[:, -1] & np.uint64(1) == 1
        cells[turned] = cells[turned].transpose(0, 2, 1)
    cells = cells.reshape(len(inputs), board.cells)
    return (
        np.take_along_axis(digits, np.take_along_axis(inputs, cells, 1).astype(np.intp), 1),
        np.take_along_axis(digits, np.take_along_axis(answers, cells, 1).astype(np.intp), 1),
    )


def _lines(numbers: NDArray[np.uint64], size: int, group: int) -> NDArray[np.int64]:
    """[n, size]: lines permuted within groups of `group` neighbours, and the groups among themselves, by size + size / group numbers."""
    inside = permutations(numbers[:, :size].reshape(-1, size // group, group))
    groups = permutations(numbers[:, size : size + size // group])
    return (groups[:, :, None] * group + inside).reshape(-1, size)


def _maze(board: Board, inputs: Grids, answers: Grids, seed: int, epoch: NDArray, index: NDArray) -> tuple[Grids, Grids]:
    which = (draws(1, _PURPOSE, seed, epoch, index)[:, 0] & np.uint64(7)).astype(np.intp)
    cells = dihedral(board.size)[which]
    return np.take_along_axis(inputs, cells, 1), np.take_along_axis(answers, cells, 1)


@cache
def dihedral(size: int) -> NDArray[np.intp]:
    """[8, cells]: of each symmetry of the square, the cell that each new cell comes from; the first is the identity."""
    grid = np.arange(size * size, dtype=np.intp).reshape(size, size)
    turns = [np.rot90(grid, quarter) for quarter in range(4)]
    return np.stack([view.ravel() for turn in turns for view in (turn, turn.T)])
