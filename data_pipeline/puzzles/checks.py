"""Whether grids are right, for [n, cells] of them at once: what evaluation counts, preparation refuses and `verify` looks for.

A Sudoku is valid if every row, column and box holds each digit once. A maze is answered if exactly the cells of one shortest path between
start and goal (4 neighbours) are marked and nothing else is changed: any shortest path, not only the published one. With d steps from start
to goal in the maze, that is so if d - 1 open cells are marked and they alone join start and goal in d steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.puzzles.games import BLANK, GOAL, OPEN, PATH, START, WALL
from data_pipeline.puzzles.mazes import steps_between


def sudoku_valid(grids: ArrayLike, box: tuple[int, int]) -> NDArray[np.bool_]:
    """[n]: whether each grid [n, cells] of tokens is full and has no digit twice in a row, column or box of `box` = (height, width)."""
    height, width = box
    size = height * width
    cells = np.asarray(grids).reshape(-1, size, size).astype(np.int64)
    fits = (cells > BLANK) & (cells <= BLANK + size)
    bits = np.left_shift(1, np.where(fits, cells - BLANK - 1, 0))
    boxes = bits.reshape(-1, size // height, height, size // width, width)
    full = (1 << size) - 1
    units = [np.bitwise_or.reduce(bits, 2), np.bitwise_or.reduce(bits, 1), np.bitwise_or.reduce(boxes, (2, 4)).reshape(-1, size)]
    return fits.all((1, 2)) & np.logical_and.reduce([(unit == full).all(1) for unit in units])


def maze_valid_and_shortest(inputs: ArrayLike, predictions: ArrayLike, side: int) -> NDArray[np.bool_]:
    """[n]: whether `predictions` [n, cells] are `inputs` with one shortest path from start to goal marked, and nothing else."""
    mazes = np.asarray(inputs).reshape(-1, side * side)
    found = np.asarray(predictions).reshape(-1, side * side)
    marked = found == PATH
    kept = np.where(marked, mazes == OPEN, found == mazes).all(1)
    ends = (mazes == START) | (mazes == GOAL)
    starts, goals = (mazes == START).argmax(1), (mazes == GOAL).argmax(1)
    steps = steps_between((mazes != WALL), starts, goals, side)
    inside = steps_between(marked | ends, starts, goals, side)
    return kept & (steps > 0) & (inside == steps) & (marked.sum(1) == steps - 1)
