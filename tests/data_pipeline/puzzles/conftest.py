"""Small generated sets for all tests that only read them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from data_pipeline.puzzles.prepare import prepare_puzzles


@pytest.fixture(scope="session")
def sudokus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 and 20 Sudokus of side 6, in several shards."""
    folder = tmp_path_factory.mktemp("sets") / "sudokus"
    with patch("data_pipeline.puzzles.shards.SHARD_BYTES", 1700):
        prepare_puzzles("sudoku", folder, size=6, puzzles=60, validation="20")
    return folder


@pytest.fixture(scope="session")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 and 10 mazes of side 8."""
    folder = tmp_path_factory.mktemp("sets") / "mazes"
    prepare_puzzles("maze", folder, size=8, puzzles=30, validation="10", least=12)
    return folder
