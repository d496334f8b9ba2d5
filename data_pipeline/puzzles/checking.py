"""Is a puzzle what it claims: one solution and this is it; a maze and one of its shortest paths. Half a sentence where it is not.

Used on what is read before anything is written, and on a prepared set by `attractor data verify`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.checks import maze_valid_and_shortest, sudoku_valid
from data_pipeline.puzzles.games import BLANK, SUDOKU, Board
from data_pipeline.puzzles.mazes import solve as solve_mazes
from data_pipeline.puzzles.mazes import well_formed
from data_pipeline.puzzles.solver import solve

Progress = Callable[[float], None]


def first_wrong(
    board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8], progress: Progress | None = None
) -> tuple[tuple[int, str] | None, NDArray[np.int32]]:
    """((row, what is wrong) of the first bad puzzle or None, ratings [n] of all)."""
    faults, ratings = (_sudoku if board.game == SUDOKU else _maze)(board, inputs, answers, progress)
    rows = np.min([bad.argmax() if bad.any() else len(bad) for _, bad in faults])
    if rows == len(inputs):
        return None, ratings
    return (int(rows), next(what for what, bad in faults if bad[rows])), ratings


Faults = list[tuple[str, NDArray[np.bool_]]]


def _sudoku(
    board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8], progress: Progress | None
) -> tuple[Faults, NDArray[np.int32]]:
    assert board.box is not None
    solved = solve(inputs, board.box, progress=progress)
    return [
        ("its answer is no full, valid grid", ~sudoku_valid(answers, board.box)),
        ("its answer does not keep the digits that are given", ((inputs != BLANK) & (inputs != answers)).any(1)),
        ("it has more than one solution", solved.solutions > 1),
        ("it has no solution", solved.solutions == 0),
    ], solved.ratings


def _maze(
    board: Board, inputs: NDArray[np.uint8], answers: NDArray[np.uint8], progress: Progress | None
) -> tuple[Faults, NDArray[np.int32]]:
    formed = well_formed(inputs)
    _, steps = solve_mazes(inputs, board.size)
    if progress:
        progress(1.0)
    return [
        ("it is no maze of walls, open cells, one start and one goal", ~formed),
        ("no way leads from its start to its goal", steps < 1),
        ("its answer is not the maze with one shortest path marked", ~maze_valid_and_shortest(inputs, answers, board.size)),
    ], steps.astype(np.int32)
