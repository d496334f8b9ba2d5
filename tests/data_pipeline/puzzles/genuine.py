"""The genuine puzzles, where they are: the folder $ATTRACTOR_DATA, by default ../shared/data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("ATTRACTOR_DATA", Path(__file__).parents[3].parent / "shared/data"))
SUDOKU, TDOKU, MAZE = DATA / "sudoku-extreme-1k", DATA / "tdoku-hard", DATA / "maze-30x30-hard-1k"

needs_sudoku = pytest.mark.skipif(not (SUDOKU / "train.csv").is_file(), reason="no genuine Sudokus in $ATTRACTOR_DATA/sudoku-extreme-1k")
needs_tdoku = pytest.mark.skipif(not (TDOKU / "validation.csv.gz").is_file(), reason="no genuine Sudokus in $ATTRACTOR_DATA/tdoku-hard")
needs_mazes = pytest.mark.skipif(
    not (MAZE / "train/all__inputs.npy").is_file(), reason="no genuine mazes in $ATTRACTOR_DATA/maze-30x30-hard-1k"
)
