"""A key for each puzzle that its symmetries leave alone, so that a puzzle and its transformed twin never fall on both sides of a split.

Maze: the smallest hash over the eight symmetries. Two mazes have one key if and only if they are one up to symmetry (but for collisions of
64-bit hashes).

Sudoku: its 1.2e12 symmetries cannot be tried, so the key is an invariant, by colour refinement: each cell starts as given or blank, and
in each round takes up the sums over its row with its band, its column with its stack (the two as an unordered pair where transposing is a
symmetry), its box and the cells of its digit. Equivalent puzzles have one key. Puzzles with one key need not be equivalent: the few that
are not are treated as if they were, which leaks nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.augment import dihedral
from data_pipeline.puzzles.draws import GOLDEN, mix
from data_pipeline.puzzles.games import BLANK, SUDOKU, Board

ROUNDS = 3
CHUNK = 4096  # puzzles at once

_LINE, _BOX, _DIGIT, _COLUMN, _GIVEN = mix(np.arange(1, 6, dtype=np.uint64) * GOLDEN)

Keys = NDArray[np.uint64]


def class_keys(board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8]) -> Keys:
    """[n] uint64 keys of puzzles [n, cells]."""
    key = _sudoku if board.game == SUDOKU else _maze
    parts = [key(board, inputs[at : at + CHUNK], answers[at : at + CHUNK]) for at in range(0, len(inputs), CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _maze(board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8]) -> Keys:
    place = mix(np.arange(1, board.cells + 1, dtype=np.uint64) * GOLDEN)
    tokens = inputs.astype(np.uint64)
    return np.min([mix(tokens[:, cells] * place).sum(1) for cells in dihedral(board.size)], axis=0)


def _sudoku(board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8]) -> Keys:
    assert board.box is not None
    size, (height, width) = board.size, board.box
    shape = (-1, size // height, height, size // width, width)
    digits = [(answers == BLANK + digit).reshape(-1, size, size) for digit in range(1, size + 1)]
    cells = mix(np.where(inputs == BLANK, GOLDEN, _GIVEN)).reshape(-1, size, size)
    for _ in range(ROUNDS):
        rows, columns = _lines(cells.sum(2), height)[:, :, None], _lines(cells.sum(1), width)[:, None, :]
        pair = rows + columns if height == width else rows + mix(columns ^ _COLUMN)
        boxes = mix(cells.reshape(shape).sum((2, 4)) ^ _BOX).repeat(height, 1).repeat(width, 2)
        of_digit = sum(np.where(mine, mix(np.where(mine, cells, 0).sum((1, 2)) ^ _DIGIT)[:, None, None], 0) for mine in digits)
        cells = mix(cells + pair + boxes + of_digit)
    return mix(cells.sum((1, 2)))


def _lines(sums: Keys, group: int) -> Keys:
    """[n, size]: a hash of each line's sum and of the set of lines it is grouped with."""
    mixed = mix(sums ^ _LINE)
    groups = mix(mixed.reshape(len(sums), -1, group).sum(2)).repeat(group, 1)
    return mix(mixed + groups)
