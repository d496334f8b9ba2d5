"""`attractor demo`: a whole path in minutes, of text or of puzzles; wired here, written in launchers/demo.py and puzzle_demo.py."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """\
[bold]Examples[/]

  attractor demo

  attractor demo sudoku
"""


class What(StrEnum):
    """What the demo trains on."""

    text = "text"
    sudoku = "sudoku"
    maze = "maze"


def command(
    what: Annotated[What, typer.Argument(metavar="[text|sudoku|maze]", help="What to train on.", show_default="text")] = What.text,
) -> None:
    """Train a small Attractor and its rival (on text a Transformer, on puzzles a TRM), and compare them. Takes minutes."""
    if what is What.text:
        from launchers.demo import demo

        demo()
    else:
        from launchers.puzzle_demo import puzzle_demo

        puzzle_demo(what.value, Path("demo") / what.value)
