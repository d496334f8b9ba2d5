"""Importing the package is cheap: what needs torch, streaming, pyarrow or datasets is imported when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import data_pipeline


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "streaming", "tokenizers", "datasets", "pyarrow", "transformers"]
    code = f"import sys, data_pipeline, data_pipeline.bench; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there() -> None:
    assert all(hasattr(data_pipeline, name) for name in data_pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Loader'"):
        data_pipeline.Loader  # noqa: B018
