"""Shortest paths in mazes, and the published choice among them, for many mazes at once.

Distances are found level by level: the cells reached so far spread to their neighbours in all mazes together.

The published label is the path that breadth-first search from the start finds with the neighbours tried in the order down, left, right, up,
the first discoverer being the parent. Search discovers the cells of one level in the lexicographic order of their paths (by induction: the
queue is in that order, so the first discoverer has the smallest path), so the label is the lexicographically smallest of all shortest
paths with down < left < right < up. Hence it needs no queue: with the distances from the goal, walk from the start, each time in the first
direction that comes a step closer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.games import GOAL, PATH, START, WALL

CHUNK_BYTES = 1 << 18  # of mazes at once: the working set stays in a core's cache

_ONE = np.uint64(1)


def distances(passable: NDArray[np.bool_], sources: NDArray[np.int64], side: int) -> NDArray[np.int16]:
    """[n, cells]: steps from cell `sources` [n] to each cell through `passable` [n, cells] cells; -1 where there is no way."""
    chunk = max(1, CHUNK_BYTES // (side + 2) ** 2)
    parts = [_distances(passable[at : at + chunk], sources[at : at + chunk], side) for at in range(0, len(passable), chunk)]
    return np.concatenate(parts) if parts else np.empty((0, side * side), np.int16)


def _distances(passable: NDArray[np.bool_], sources: NDArray[np.int64], side: int) -> NDArray[np.int16]:
    count, line = len(passable), side + 2  # a border of walls, so that no step leaves the grid
    grid = np.zeros((count, line, line), np.bool_)
    grid[:, 1:-1, 1:-1] = passable.reshape(count, side, side)
    unreached = grid.reshape(count, line * line)
    rows, columns = np.divmod(sources, side)
    front = np.zeros_like(unreached)
    front[np.arange(count), (rows + 1) * line + columns + 1] = True
    steps = np.zeros(unreached.shape, np.int16)
    inner = slice(line, -line)
    reached = np.zeros_like(front[:, inner])
    while True:
        unreached &= ~front
        np.bitwise_or(front[:, : -2 * line], front[:, 2 * line :], out=reached)
        reached |= front[:, line - 1 : -line - 1]
        reached |= front[:, line + 1 : 1 - line]
        reached &= unreached[:, inner]
        if not reached.any():
            break
        steps += unreached  # whatever is reached later has one step more
        front[:, inner] = reached
    steps[unreached] = -1
    inside = steps.reshape(count, line, line)[:, 1:-1, 1:-1]
    return np.where(passable.reshape(inside.shape), inside, np.int16(-1)).reshape(count, side * side)


def steps_between(passable: NDArray[np.bool_], starts: NDArray[np.int64], goals: NDArray[np.int64], side: int) -> NDArray[np.int16]:
    """[n]: steps of a shortest path from `starts` to `goals` through `passable` [n, cells], -1 where there is none."""
    return np.take_along_axis(distances(passable, starts, side), np.asarray(goals)[:, None], 1)[:, 0]


def apart(passable: NDArray[np.bool_], starts: NDArray[np.int64], goals: NDArray[np.int64], side: int, least: int) -> NDArray[np.bool_]:
    """[n]: whether the shortest path from `starts` to `goals` through `passable` [n, cells] has `least` steps or more; no path: False.

    For a sampler that rejects thousands for each it keeps: a row of cells is one integer, and mazes leave the search once they are decided.
    """
    count = len(passable)
    bits = np.zeros((count, side, 64), np.bool_)
    bits[:, :, :side] = passable.reshape(count, side, side)
    free = np.zeros((side + 2, count), np.uint64)
    free[1:-1] = np.packbits(bits, axis=2, bitorder="little").view(np.uint64)[:, :, 0].T
    rows = np.arange(count)
    front, goal = np.zeros_like(free), np.zeros_like(free)
    front[starts // side + 1, rows] = _ONE << (starts % side).astype(np.uint64)
    goal[goals // side + 1, rows] = _ONE << (goals % side).astype(np.uint64)
    far, step = np.zeros(count, np.bool_), 0
    free &= ~front
    while len(rows):
        for _ in range(8):
            step += 1
            spread = front << _ONE | front >> _ONE
            spread[1:] |= front[:-1]
            spread[:-1] |= front[1:]
            spread &= free
            free ^= spread
            front = spread
            if step >= least:
                far[rows] |= (spread & goal).any(0)
        undecided = front.any(0) & (free & goal).any(0)
        rows, front, free, goal = rows[undecided], front[:, undecided], free[:, undecided], goal[:, undecided]
    return far


def solve(inputs: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """(answers [n, cells] by the published rule, steps [n] of their paths) of mazes [n, cells]; where there is no way the answer is the
    maze itself and the steps are -1.
    """
    rows = np.arange(len(inputs))
    at = (inputs == START).argmax(1)
    left = distances(inputs != WALL, (inputs == GOAL).argmax(1), side)
    steps = left[rows, at]
    padded = np.full((len(inputs), side + 2, side + 2), -1, np.int16)
    padded[:, 1:-1, 1:-1] = left.reshape(len(left), side, side)
    padded = padded.reshape(len(inputs), (side + 2) ** 2)
    line = side + 2
    order = np.array([line, -1, 1, -line])  # down, left, right, up
    answers = inputs.copy()
    at = (at // side + 1) * line + at % side + 1
    for level in range(int(steps.max(initial=0)) - 1, 0, -1):  # the steps left after this one; the goal itself is not marked
        going = np.flatnonzero(steps > level)
        nearer = padded[going[:, None], at[going, None] + order] == level
        at[going] += order[nearer.argmax(1)]
        answers[going, (at[going] // line - 1) * side + at[going] % line - 1] = PATH
    return answers, steps


def well_formed(inputs: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[n]: whether each maze [n, cells] has one start, one goal, and else walls and open cells."""
    known = (inputs >= WALL) & (inputs <= GOAL)
    return known.all(1) & ((inputs == START).sum(1) == 1) & ((inputs == GOAL).sum(1) == 1)
