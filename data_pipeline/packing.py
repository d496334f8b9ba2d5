"""Packing: one endless row of token ids, cut into windows.

    documents   [bos a b c] [bos d] [bos e f g h]        each begins with its begin token
    windows of 4    [bos a b c] [bos d bos e] [f g h]    only the last may be shorter

Windows do not overlap: concatenated they are exactly the documents, every token once. Pure; numpy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Packer:
    """Cuts what is pushed into windows of `length` ids, holding back what does not fill one."""

    def __init__(self, length: int, dtype: np.dtype) -> None:
        if length < 2:
            raise ValueError(f"a window needs an input and a target, so at least 2 ids, not {length}")
        self.length = length
        self._held = np.empty(0, dtype)

    def push(self, ids: NDArray) -> NDArray:
        """Add ids [n]; returns the windows [k, length] that are now full."""
        joined = np.concatenate([self._held, ids.astype(self._held.dtype, copy=False)])
        full = len(joined) // self.length * self.length
        self._held = joined[full:].copy()
        return joined[:full].reshape(-1, self.length)

    def finish(self) -> NDArray:
        """The ids held back [0 .. length - 1]; the packer is empty afterwards."""
        held, self._held = self._held, self._held[:0]
        return held
