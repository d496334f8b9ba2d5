"""Sudokus and mazes: generated or read, checked, prepared as shards, and streamed with symmetries drawn lazily.

Importing this imports neither torch nor streaming; they come with the first stream, set or preparation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.puzzles.checks import maze_valid_and_shortest, sudoku_valid
from data_pipeline.puzzles.manifest import PuzzleManifest, open_puzzles

if TYPE_CHECKING:
    from data_pipeline.puzzles.stream import PuzzleBatch, PuzzleSet, PuzzleStream

_NEED_TORCH = ("PuzzleBatch", "PuzzleSet", "PuzzleStream")

__all__ = [
    "PuzzleBatch",
    "PuzzleManifest",
    "PuzzleSet",
    "PuzzleStream",
    "maze_valid_and_shortest",
    "open_puzzles",
    "sudoku_valid",
]


def __getattr__(name: str) -> Any:
    """The streams, on first use (PEP 562): they need torch."""
    if name in _NEED_TORCH:
        from data_pipeline.puzzles import stream

        return getattr(stream, name)
    raise AttributeError(f"module 'data_pipeline.puzzles' has no attribute {name!r}")
