"""Mazes: the label against the search that defines it, distances, and what counts as answered."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.puzzles.checks import maze_valid_and_shortest
from data_pipeline.puzzles.games import GOAL, OPEN, PATH, START, WALL, board_of
from data_pipeline.puzzles.mazes import apart, solve, steps_between, well_formed
from data_pipeline.puzzles.readers import read_puzzles
from data_pipeline.puzzles.sampling import maze_candidates
from tests.data_pipeline.puzzles.genuine import MAZE, needs_mazes


def searched(maze: NDArray[np.uint8], side: int) -> tuple[list[int], int]:
    """(answer, steps) by a queue, as the rule is published: down, left, right, up, the first discoverer is the parent."""
    start, goal = int((maze == START).argmax()), int((maze == GOAL).argmax())
    parent = {start: start}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        for down, right in ((1, 0), (0, -1), (0, 1), (-1, 0)):
            row, column = cell // side + down, cell % side + right
            if 0 <= row < side and 0 <= column < side and maze[near := row * side + column] != WALL and near not in parent:
                parent[near] = cell
                queue.append(near)
    answer, cell, steps = maze.tolist(), goal, 0
    if goal not in parent:
        return answer, -1
    while cell != start:
        cell, steps = parent[cell], steps + 1
        if cell != start:
            answer[cell] = PATH
    return answer, steps


@pytest.mark.parametrize("side", [5, 10, 31])
def test_answers_are_those_of_the_search(side: int) -> None:
    mazes = maze_candidates(board_of("maze", side), 3, np.arange(120))
    answers, steps = solve(mazes, side)
    for maze, answer, distance in zip(mazes, answers, steps.tolist(), strict=True):
        assert (answer.tolist(), distance) == searched(maze, side)
    ends = (mazes == START).argmax(1), (mazes == GOAL).argmax(1)
    assert (steps_between(mazes != WALL, *ends, side) == steps).all()
    for least in (1, 7, 8, 9, 30):
        assert (apart(mazes != WALL, *ends, side, least) == (steps >= max(1, least))).all()
    solvable = steps > 0
    assert (maze_valid_and_shortest(mazes, answers, side) == solvable).all()


@needs_mazes
@pytest.mark.parametrize("split", ["train", "validation"])
def test_genuine_labels_follow_the_rule(split: str) -> None:
    rows = read_puzzles("maze", MAZE, split)
    assert rows is not None
    assert len(rows.inputs) == {"train": 1000, "validation": 500}[split]
    answers, steps = solve(rows.inputs, 30)
    assert (answers == rows.answers).all()
    assert steps.min() == 109  # 110 cells with both ends
    assert well_formed(rows.inputs).all()
    assert maze_valid_and_shortest(rows.inputs, rows.answers, 30).all()


def test_the_sampler_keeps_to_its_bounds() -> None:
    mazes = maze_candidates(board_of("maze", 30), 0, np.arange(2000))
    walls = (mazes == WALL).sum(1)
    assert (walls.min(), walls.max()) == (270, 450)
    assert abs(walls.mean() - 360) < 5
    assert well_formed(mazes).all()
    assert (maze_candidates(board_of("maze", 30), 0, np.arange(1000, 1010)) == mazes[1000:1010]).all()
    often = (mazes == WALL).mean(0)  # each cell is a wall as often as any other
    assert abs(often - 0.4).max() < 0.06
    assert len(np.unique((mazes == START).argmax(1))) > 600


def tokens(text: str) -> NDArray[np.uint8]:
    return np.array([["#.SGo".index(sign) + 1 for sign in text]], np.uint8)


@pytest.mark.parametrize(
    ("maze", "prediction", "right"),
    [
        ("S.....G..", "So.o..G..", False),  # a detour marked beside it
        ("S.....G..", "S..o..G..", True),
        ("S.....G..", "S.....G..", False),  # nothing marked
        ("S.....G..", "Soooo.G..", False),  # too long, and not joined
        ("S..#..G..", "S..o..G..", False),  # through a wall
        ("S....G...", "So..oG...", True),  # one of two shortest paths ...
        ("S....G...", "Soo..G...", True),  # ... and the other
        ("S....G...", "So.o.G...", False),  # as many cells, no path
        ("S....G...", "Soo..S...", False),  # the goal changed
        ("S..##...G", "Soo##.o.G", False),  # a corner is no step
        ("SG.......", "SG.......", True),  # neighbours: nothing to mark
        ("S.#.##..G", "S.#o##ooG", True),
        ("S.#.##..G", "So#o##ooG", False),  # a dead end marked too
        ("S.###...G", "S.###...G", False),  # no way at all
    ],
)
def test_what_counts_as_answered(maze: str, prediction: str, right: bool) -> None:
    assert maze_valid_and_shortest(tokens(maze), tokens(prediction), 3).tolist() == [right]


def test_no_mazes() -> None:
    answers, steps = solve(np.empty((0, 16), np.uint8), 4)
    assert answers.shape == (0, 16)
    assert len(steps) == 0
    assert OPEN in maze_candidates(board_of("maze", 4), 0, np.arange(1))
