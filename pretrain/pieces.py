"""What each rank of a layout holds: which elements of which parameter lie where in its optimizer's fp32 masters.

DeepSpeed's files hold flat partitions without names. Beside them every rank leaves pieces_rank_00000.json, from which whole parameters, and
all that the optimizer keeps of them, are put together again, or cut for another layout (pretrain/stored.py, pretrain/adopt.py).

A parameter may be cut into equal shards over the tensor ranks, along its rows (dim 0) or columns (dim 1), and each shard, in its own flat
order, into runs over the data ranks. A piece is one such run. Names and shapes are those of the whole parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pretrain.layout import Layout, as_dict
from pretrain.muon import cut_contiguously, cut_each

FORMAT = 1
PIECES = "pieces_rank_"
"""What its files begin with."""


class Held(NamedTuple):
    """Elements start:stop of shard number `shard` of `shards` of a parameter cut along `dim`, at `offset` of a master."""

    name: str
    dim: int
    shards: int
    shard: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Pieces:
    """What one rank holds."""

    layout: dict[str, int]
    """Of the run: world_size, pipeline, data, tensor, zero."""
    shapes: dict[str, tuple[int, ...]]
    """Every parameter of the model, whole, those of other stages included."""
    masters: list[list[Held]]
    """By master, in the order of `pretrain.zero.masters`. What no piece covers is padding."""

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"format": FORMAT, "layout": self.layout, "shapes": self.shapes, "masters": self.masters})

    @classmethod
    def from_json(cls, text: str) -> Pieces:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError for what it cannot have written."""
        stored: dict[str, Any] = json.loads(text)
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']} of pieces, where this code reads {FORMAT}")
        shapes = {name: tuple(shape) for name, shape in stored["shapes"].items()}
        masters = [[Held(*held) for held in master] for master in stored["masters"]]
        numbers = [*shapes.values(), *(held[1:] for master in masters for held in master)]
        if not all(isinstance(number, int) and number >= 0 for row in numbers for number in row):
            raise ValueError("a size or place is no natural number")
        return cls(stored["layout"], shapes, masters)


def pieces_file(rank: int) -> str:
    """Its name in a checkpoint."""
    return f"{PIECES}{rank:05d}.json"


def layout_record(layout: Layout, zero: int) -> dict[str, int]:
    """A layout as checkpoints keep it."""
    return {"world_size": layout.ranks, **as_dict(layout, zero=zero)}


def describe_layout(layout: Mapping[str, int]) -> str:
    """As a user writes it; `layout` is what a manifest says."""
    if not layout:
        return "no layout (canonical)"
    ranks = f"{layout['world_size']} rank(s) with ZeRO stage {layout['zero']}"
    if "pipeline" not in layout:
        return ranks
    return f"{ranks} ({Layout(layout['pipeline'], layout['data'], layout['tensor']).describe()})"


class Shard(NamedTuple):
    """A parameter as one tensor rank has it: its name, local shape, and of which cut it is which part."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    shards: int = 1
    shard: int = 0

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


def whole(shard: Shard) -> list[Held]:
    """Of a parameter that is its own master (ZeRO 0)."""
    return [_held(shard, 0, shard.size, 0)]


def flat_run(shards: Sequence[Shard], offsets: Sequence[int], partition: int, rank: int, ranks: int) -> list[Held]:
    """Of data rank `rank`, when the shards lie at `offsets` of one buffer cut into `ranks` runs of `partition` (ZeRO 1 and 2)."""
    cut = cut_contiguously([shard.size for shard in shards], offsets, partition, ranks)
    return [_held(shards[piece.matrix], piece.start, piece.stop, piece.offset) for piece in cut[rank]]


def joined_shares(shards: Sequence[Shard], rank: int, ranks: int) -> list[Held]:
    """Of data rank `rank`, when each shard by itself is cut into `ranks` shares and a rank's shares are joined (ZeRO 3)."""
    cut = cut_each([shard.size for shard in shards], ranks)
    return [_held(shards[piece.matrix], piece.start, piece.stop, piece.offset) for piece in cut[rank]]


def _held(shard: Shard, start: int, stop: int, offset: int) -> Held:
    return Held(shard.name, shard.dim, shard.shards, shard.shard, start, stop, offset)
