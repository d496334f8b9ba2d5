"""The two games: what a puzzle's tokens mean and which shapes there are.

A puzzle is `inputs` and `answers`, each [cells] uint8 tokens, row by row. Token 0 is padding and never in a puzzle (HRM's and TRM's
convention, whose files are read as they are).

    sudoku n x n, boxes h x w, h w = n      1 blank, 2 ... n + 1 the digits 1 ... n          vocabulary n + 2
    maze s x s                              1 wall, 2 open, 3 start, 4 goal, 5 path          vocabulary 6

Refuses games and sizes that there are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import Refusal

SUDOKU, MAZE = "sudoku", "maze"
GAMES = (SUDOKU, MAZE)

BLANK = 1  # of a Sudoku; the digit d is BLANK + d
WALL, OPEN, START, GOAL, PATH = 1, 2, 3, 4, 5  # of a maze

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # Sudoku: size -> height and width of a box
SMALLEST_MAZE, LARGEST_MAZE = 4, 64  # the sampler keeps a row of cells in one 64-bit number
DEFAULT_SIZE = {SUDOKU: 9, MAZE: 30}


@dataclass(frozen=True)
class Board:
    """The shape of one game's puzzles: `size` rows of `size` cells; `box` is (height, width) of a Sudoku's box, None for a maze."""

    game: str
    size: int
    box: tuple[int, int] | None

    @property
    def cells(self) -> int:
        """Tokens of a puzzle."""
        return self.size * self.size

    @property
    def vocabulary_size(self) -> int:
        """Tokens there are, padding included."""
        return self.size + 2 if self.game == SUDOKU else PATH + 1


def board_of(game: str, size: int) -> Board:
    """The board of `game` with side `size`; a Refusal where there is none."""
    if game not in GAMES:
        raise Refusal(f"There is no game {game!r}, only {' and '.join(GAMES)}.")
    if game == SUDOKU:
        if size not in BOXES:
            raise Refusal(f"There is no Sudoku of size {size} here. Its size is {', '.join(map(str, BOXES))} (boxes 2x2, 2x3, 3x3).")
        return Board(game, size, BOXES[size])
    if not SMALLEST_MAZE <= size <= LARGEST_MAZE:
        raise Refusal(f"A maze of size {size} cannot be made. Its side is from {SMALLEST_MAZE} to {LARGEST_MAZE} cells.")
    return Board(game, size, None)


def board_of_cells(game: str, cells: int, where: str) -> Board:
    """The board whose puzzles have `cells` tokens; `where` names the source in the Refusal."""
    size = round(cells**0.5)
    if size * size != cells or (game == SUDOKU and size not in BOXES):
        fits = "16, 36 or 81 (4x4, 6x6, 9x9)" if game == SUDOKU else "a square number"
        raise Refusal(f"{where} has puzzles of {cells} cells; a {game} has {fits}. Give a file of that game's puzzles.")
    return board_of(game, size)
