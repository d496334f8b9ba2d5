"""Keys and values of every attention for the tokens so far, so that a new token costs its own computation and no other's.

Why a cached equilibrium is that of the full recomputation. f is causal: row t of f(y, y0) reads y and y0 at positions <= t alone. So the
stacked system y = f(y, y0) is block lower triangular: y*_1 solves an equation of its own; given y*_1 ... y*_{t-1}, y*_t solves

    y_t = f_t(y_t; keys and values of y*_1 ... y*_{t-1}),                                  with no later token in it.

Solved position by position it has the very solution of the joint system, and earlier positions enter through their keys and values only.

    adaptive solve   one slot. A new token's keys and values are written at every evaluation of f while it is not done and never again:
                     they are those of the point of its last evaluation, within the tolerance of the equilibrium. Both ways then stop
                     within L / (1 - L) tol ||y|| of the same equilibrium, L being f's contraction, hence within twice that of each other;
                     an error of that size in earlier keys moves a token's equilibrium by the same order.
    n evaluations,   one slot an iteration: iteration k of a token reads iteration k of those before it, as it does when all are
    n loops          computed together, so the result is the same number, up to the rounding of other matrix shapes.

Rows may hold different numbers of tokens: each continues at its own position. Prompts of different lengths are padded on the right;
what padding leaves behind lies after its row's tokens, is masked, and is overwritten by those that follow.

Shapes: b rows, n new tokens; keys, values [b, kv_heads, capacity, head_dim], allocated when first used, for each attention and slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Context
from model.config import BackboneConfig
from model.rotary import rotary_tables


class Cache:
    """For `rows` sequences of at most `capacity` tokens, padding of a step included."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity, self.lengths = capacity, [0] * rows
        self.slot = 0
        self.done: Tensor | None = None
        """[b, n], of the new tokens: those whose keys and values stay as they are (while an adaptive solve runs)."""
        self._kept: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}
        self._tables: dict[str, Tensor] = {}
        self._starts: Tensor | None = None  # [b, 1], of rows of different lengths
        self._new: list[int] = []
        self._at: slice | tuple[Tensor, Tensor] = slice(0)  # where the new tokens go: the same for all rows, or (row, position) [b, n]
        self._end = 0  # one past the last position that is read

    def begin(self, config: BackboneConfig, tokens: Tensor, lengths: Sequence[int] | None = None) -> Context:
        """The context of new tokens [b, n], the first lengths[i] of row i and padding after them. Raises ValueError where they do not
        fit."""
        rows, new = tokens.shape
        self._new = [new] * rows if lengths is None else list(lengths)
        if len(self._new) != len(self.lengths) or not all(1 <= length <= new for length in self._new):
            raise ValueError(f"The cache holds {len(self.lengths)} rows, and {rows} with {self._new} of {new} tokens are to be added.")
        first, last = min(self.lengths), max(self.lengths)
        self._end = last + new
        if self._end > self.capacity:
            raise ValueError(f"{last} tokens and {new} more are above the cache's capacity of {self.capacity}.")
        self._place(first, last, tokens)
        mask = None
        if first != last or (first > 0 and new > 1):  # else attention is plainly causal, or one token that sees all
            keys = torch.arange(self._end, device=tokens.device)
            at = self._at[1] if isinstance(self._at, tuple) else keys[None, self._at]
            mask = (keys <= at[:, :, None])[:, None]
        padding = None
        if min(self._new) < new:
            padding = torch.arange(new, device=tokens.device) >= torch.tensor(self._new, device=tokens.device)[:, None]
        tables = lambda part: rotary_tables(self.capacity, config.head_dim, config.rope_base, tokens.device)[part]  # noqa: E731
        cos, sin = self.at_positions("cos", lambda: tables(0)), self.at_positions("sin", lambda: tables(1))
        return Context(cos, sin, mask, tokens, self, padding)

    def _place(self, first: int, last: int, tokens: Tensor) -> None:
        rows, new = tokens.shape
        if first == last:
            self._at, self._starts = slice(first, first + new), None
            return
        if self._starts is None:
            self._starts = torch.tensor(self.lengths, device=tokens.device)[:, None]
        positions = self._starts + torch.arange(new, device=tokens.device)
        self._at = torch.arange(rows, device=tokens.device)[:, None].expand_as(positions), positions

    def at_positions(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Rows of a table [capacity, ...], made once, at the positions of the new tokens: [n, ...], or [b, n, ...] where rows differ."""
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = make()
        return table[self._at] if isinstance(self._at, slice) else table[self._at[1]]

    def join(self, attention: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far [b, kv_heads, end, head_dim], from those of the new ones [b, kv_heads, n, head_dim], which
        are written to their places. The cache does not advance: another evaluation writes to the same."""
        kept = self._kept.get((attention, self.slot))
        if kept is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            kept = self._kept[attention, self.slot] = (k.new_zeros(shape), v.new_zeros(shape))
        for buffer, new in zip(kept, (k, v), strict=True):
            self._write(buffer, new)
        return kept[0][:, :, : self._end], kept[1][:, :, : self._end]

    def _write(self, buffer: Tensor, new: Tensor) -> None:
        if isinstance(self._at, slice):
            place = buffer[:, :, self._at]
            place.copy_(new if self.done is None else torch.where(self.done[:, None, :, None], place, new))
            return
        rows, positions = self._at
        new = new.transpose(1, 2)  # [b, n, kv_heads, head_dim]
        if self.done is not None:
            new = torch.where(self.done[:, :, None, None], buffer[rows, :, positions], new)
        buffer[rows, :, positions] = new

    def slot_an_evaluation(self, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """f, each of whose evaluations has a slot of its own."""
        numbers = count()

        def evaluate(*inputs: Any) -> Tensor:
            self.slot = next(numbers)
            value = f(*inputs)
            self.slot = 0
            return value

        return evaluate

    def advance(self, x: Tensor) -> Tensor:
        """x [b, n, w] at each row's last new token [b, w]; the new tokens now belong to those so far."""
        self.lengths = [length + new for length, new in zip(self.lengths, self._new, strict=True)]
        if len(set(self._new)) == 1:
            if self._starts is not None:
                self._starts = self._starts + self._new[0]
            return x[:, self._new[0] - 1]
        self._starts = None
        return x[torch.arange(len(x), device=x.device), torch.tensor(self._new, device=x.device) - 1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows."""
        self.lengths = [self.lengths[row] for row in rows]
        self._starts = None
        for key, buffers in self._kept.items():
            index = torch.tensor(rows, device=buffers[0].device)
            self._kept[key] = (buffers[0][index], buffers[1][index])
