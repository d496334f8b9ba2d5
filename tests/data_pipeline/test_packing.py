"""Packing loses nothing, doubles nothing, and only the last window is short."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.packing import Packer

documents = st.lists(st.lists(st.integers(0, 65535), max_size=50), max_size=20)


def pack(parts: Iterable[NDArray], length: int, dtype: np.dtype) -> list[NDArray]:
    """All windows of what arrives in `parts`."""
    packer = Packer(length, dtype)
    windows = [window for part in parts for window in packer.push(part)]
    rest = packer.finish()
    return [*windows, rest] if len(rest) else windows


@given(documents, st.integers(2, 40))
def test_windows_concatenate_to_the_documents(texts: list[list[int]], length: int) -> None:
    windows = pack([np.array(text, np.uint16) for text in texts], length, np.dtype(np.uint16))
    assert [token for window in windows for token in window.tolist()] == [token for text in texts for token in text]
    assert all(len(window) == length for window in windows[:-1])
    assert all(1 <= len(window) <= length for window in windows)


@given(st.lists(st.integers(0, 9), max_size=60), st.lists(st.integers(0, 60), max_size=5), st.integers(2, 9))
def test_windows_do_not_depend_on_how_ids_arrive(ids: list[int], cuts: list[int], length: int) -> None:
    row = np.array(ids, np.uint32)
    parts = np.split(row, sorted(min(cut, len(row)) for cut in cuts))
    whole = pack([row], length, row.dtype)
    assert [window.tolist() for window in pack(parts, length, row.dtype)] == [window.tolist() for window in whole]


def test_a_packer_is_empty_after_it_finished() -> None:
    packer = Packer(4, np.dtype(np.uint16))
    packer.push(np.arange(6, dtype=np.uint16))
    assert packer.finish().tolist() == [4, 5]
    assert packer.finish().tolist() == []


def test_a_window_needs_an_input_and_a_target() -> None:
    with pytest.raises(ValueError, match="at least 2 ids"):
        Packer(1, np.dtype(np.uint16))
