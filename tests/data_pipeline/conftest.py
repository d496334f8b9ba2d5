"""One small prepared set for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_pipeline.sets import random_documents, write_set


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,500 tokens in 150 windows of 17 ids and several shards, and a validation split."""
    folder = tmp_path_factory.mktemp("sets") / "small"
    return write_set(folder, random_documents(120), validation=random_documents(20, seed=1))
