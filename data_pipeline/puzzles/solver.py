"""A Sudoku solver for many puzzles at once: whether there is one solution, which, and how many guesses it takes to know.

A board is the set of digits that each cell may still hold, as the low bits of a uint16; the arrays are [size, size, boards], so that every
operation is one vector instruction over hundreds of boards. Inference repeats, until nothing changes:

    naked single     a cell with one digit left: no other cell of its row, column and box has it
    hidden single    a digit with one cell left in a row, column or box goes there
    locked digits    a digit that a row (column) has only inside one box leaves the rest of that box, and the other way round

What is then undecided branches: the cell with the fewest digits left (the first of them in reading order) either holds its smallest digit
or does not. The search runs depth first, a batch of boards at a time, until a puzzle's tree is exhausted or `limit` solutions are known.

The rating of a puzzle is the number of branchings of its whole tree, that is of finding the solution and proving it the only one: 0 where
inference alone solves it. The tree depends on the puzzle alone, not on what it is solved together with. (Sudoku-Extreme's own ratings are
the guesses of another solver, tdoku: fewer; over the 1,000 rows of sudoku-extreme-1k the ranks of the two correlate 0.70.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles.games import BLANK

BATCH = 1024  # boards at once: a few hundred kB an array, which a core's cache holds
PASSES = 3  # of inference between two looks at which boards are done
SLICE = 8192  # puzzles under way at once

_ONE = np.uint16(1)

Masks = NDArray[np.uint16]


class Solved(NamedTuple):
    """Of n puzzles: solutions found [n] (at most the limit, or a few more), one solution [n, cells] in tokens (0 where there is none), and
    ratings [n], which are whole only where the limit was not reached.
    """

    solutions: NDArray[np.int32]
    answers: NDArray[np.uint8]
    ratings: NDArray[np.int32]


def solve(inputs: NDArray[np.uint8], box: tuple[int, int], *, limit: int = 2, progress: Callable[[float], None] | None = None) -> Solved:
    """Solve puzzles [n, cells] of tokens with boxes of `box` = (height, width). `progress` is called with the share done."""
    parts = []
    for at in range(0, len(inputs), SLICE):
        parts.append(search(masks_of(inputs[at : at + SLICE], box), box, limit))
        if progress:
            progress(min(1.0, (at + SLICE) / len(inputs)))
    if not parts:
        return Solved(np.empty(0, np.int32), np.empty_like(inputs), np.empty(0, np.int32))
    return Solved(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def masks_of(inputs: NDArray[np.uint8], box: tuple[int, int]) -> Masks:
    """Boards [size, size, n] of puzzles [n, cells]: all digits for a blank."""
    size = box[0] * box[1]
    mask = np.zeros(size + 2, np.uint16)
    mask[BLANK] = (1 << size) - 1
    mask[BLANK + 1 :] = 1 << np.arange(size)
    return np.ascontiguousarray(mask[inputs].T).reshape(size, size, -1)


def search(boards: Masks, box: tuple[int, int], limit: int) -> Solved:
    """Solve one slice of boards [size, size, n]."""
    size, count = box[0] * box[1], boards.shape[2]
    found = np.zeros(count, np.int32)
    ratings = np.zeros(count, np.int32)
    answers = np.zeros((count, size * size), np.uint8)
    stack = [(boards, np.arange(count))]  # boards [size, size, k] and the puzzles [k] they belong to
    while stack:
        boards, owners = _pop(stack)
        wanted = found[owners] < limit
        boards, owners = (boards, owners) if wanted.all() else (np.compress(wanted, boards, 2), owners[wanted])
        if not len(owners):
            continue
        sound, changed = infer(boards, box)
        full = sound & _all_single(boards)
        if full.any():
            rows = np.flatnonzero(full)
            rows = rows[_valid(np.take(boards, rows, 2), box)]
            np.add.at(found, owners[rows], 1)
            answers[owners[rows]] = _tokens(np.take(boards, rows, 2))
        stuck = np.flatnonzero(sound & ~full & ~changed)
        if len(stuck):
            np.add.at(ratings, owners[stuck], 1)
            stack.append((_branch(np.take(boards, stuck, 2)), np.tile(owners[stuck], 2)))
        going = np.flatnonzero(sound & ~full & changed)
        if len(going):
            stack.append((np.take(boards, going, 2), owners[going]))
    return Solved(found, answers, ratings)


def _pop(stack: list[tuple[Masks, NDArray[np.int64]]]) -> tuple[Masks, NDArray[np.int64]]:
    """Take up to BATCH boards off the top."""
    taken, room = [], BATCH
    while stack and room:
        boards, owners = stack.pop()
        if len(owners) > room:
            stack.append((boards[:, :, :-room], owners[:-room]))
            boards, owners = boards[:, :, -room:], owners[-room:]
        taken.append((boards, owners))
        room -= len(owners)
    boards = np.ascontiguousarray(np.concatenate([boards for boards, _ in taken], 2))  # infer() works on it in place, through views
    return boards, np.concatenate([owners for _, owners in taken])


def infer(boards: Masks, box: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """PASSES passes of inference, in place. Returns [n]: no contradiction was met; the last pass changed something."""
    size, count = boards.shape[0], boards.shape[2]
    height, width = box
    cells = boards.reshape(size // height, height, size // width, width, count)
    before = cells
    for turn in range(PASSES):
        if turn == PASSES - 1:
            before = cells.copy()
        _naked_singles(cells)
        everywhere = _hidden_singles(cells, size)
        _locked(cells)
    changed = np.bitwise_or.reduce((before ^ cells).reshape(-1, count), 0) != 0
    sound = (everywhere == (1 << size) - 1) & (cells.reshape(-1, count).min(0) > 0)
    return sound, changed


def _naked_singles(cells: Masks) -> None:
    """cells [bands, height, stacks, width, n]: strike each decided digit from its row, column and box, save where it is decided."""
    single = cells - _ONE
    single &= cells
    np.minimum(single, _ONE, out=single)
    single -= _ONE  # all ones where one digit is left, else 0
    single &= cells
    triads = np.bitwise_or.reduce(single, 3)
    across = np.bitwise_or.reduce(triads, 2)[:, :, None] | np.bitwise_or.reduce(triads, 1)[:, None]
    down = np.bitwise_or.reduce(np.bitwise_or.reduce(single, 0), 0)
    struck = across[:, :, :, None] | down
    struck ^= single
    np.invert(struck, out=struck)
    cells &= struck


def _hidden_singles(cells: Masks, size: int) -> Masks:
    """Decide cells that alone can hold a digit in a unit. Returns [n]: the digits that every unit still has a place for."""
    full = np.uint16((1 << size) - 1)
    row_triads, column_triads = _once_twice(cells, None, 3), _once_twice(cells, None, 1)
    rows, boxes = _once_twice(*row_triads, 2), _once_twice(*row_triads, 1)
    columns = _once_twice(*column_triads, 0)
    everywhere = [np.bitwise_and.reduce(np.bitwise_and.reduce(once, 0), 0) for once, _ in (rows, boxes, columns)]
    across = (rows[1] ^ full)[:, :, None] | (boxes[1] ^ full)[:, None]
    hidden = across[:, :, :, None] | (columns[1] ^ full)
    hidden &= cells
    kept = np.negative(hidden)
    hidden &= kept  # one digit of them: were there two, a unit would now lack the other
    np.minimum(hidden, _ONE, out=kept)
    kept -= _ONE  # all ones where nothing is hidden
    hidden |= kept
    cells &= hidden
    return everywhere[0] & everywhere[1] & everywhere[2]


def _once_twice(once: Masks, twice: Masks | None, axis: int) -> tuple[Masks, Masks]:
    """Of groups along `axis`: the digits with a place in some member, and those with two places or more."""
    parts = np.moveaxis(once, axis, 0)
    some, more = parts[0].copy(), np.zeros_like(parts[0])
    for part in parts[1:]:
        more |= some & part
        some |= part
    return some, more if twice is None else more | np.bitwise_or.reduce(twice, axis)


def _locked(cells: Masks) -> None:
    """Strike digits that a line has in one box only from the rest of that box, and those that a box has in one line only from the line."""
    for line, box, cell in ((2, 1, 3), (0, 2, 1)):  # axes: over the boxes of a line, over the lines of a box, over the cells of a triad
        triads = np.bitwise_or.reduce(cells, cell)
        struck = np.zeros_like(triads)
        for one, other in ((line, box), (box, line)):
            locked = triads & ~np.expand_dims(_once_twice(triads, None, one)[1], one)
            struck |= np.expand_dims(np.bitwise_or.reduce(locked, other), other) ^ locked
        np.invert(struck, out=struck)
        cells &= np.expand_dims(struck, cell)


def _all_single(boards: Masks) -> NDArray[np.bool_]:
    more = boards - _ONE
    more &= boards
    return np.bitwise_or.reduce(more.reshape(-1, boards.shape[2]), 0) == 0


def _valid(boards: Masks, box: tuple[int, int]) -> NDArray[np.bool_]:
    """[n]: whether each unit of decided boards [size, size, n] has every digit."""
    size, (height, width), count = len(boards), box, boards.shape[2]
    cells = boards.reshape(size // height, height, size // width, width, count)
    units = [np.bitwise_or.reduce(cells, axes).reshape(size, count) for axes in ((2, 3), (0, 1), (1, 3))]
    return np.logical_and.reduce([(unit == (1 << size) - 1).all(0) for unit in units])


def _tokens(boards: Masks) -> NDArray[np.uint8]:
    """Decided boards [size, size, n] as tokens [n, cells]."""
    return (np.log2(boards.reshape(len(boards) ** 2, boards.shape[2]).T) + BLANK + 1).astype(np.uint8)


def _branch(boards: Masks) -> Masks:
    """Two boards for each of [size, size, n]: its most decided open cell holds its smallest digit; it does not."""
    size, count = len(boards), boards.shape[2]
    left = _digits_left(size)
    first = boards.reshape(-1, count)
    second = first.copy()
    cell, each = left[first].argmin(0), np.arange(count)
    digits = first[cell, each]
    smallest = digits & np.negative(digits)
    first[cell, each] = smallest
    second[cell, each] = digits ^ smallest
    return np.concatenate([first, second], 1).reshape(size, size, -1)


@cache
def _digits_left(size: int) -> NDArray[np.uint8]:
    """[2^size]: how many digits a mask has, 255 for those that have one or none."""
    counts = np.array([mask.bit_count() for mask in range(1 << size)], np.uint8)
    return np.where(counts > 1, counts, np.uint8(255))
