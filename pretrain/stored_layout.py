"""Whole parameters, and what the optimizer keeps of them, out of the files that DeepSpeed's ranks wrote.

    file of a rank      holds its masters and the optimizer's state of each          where there
    ZeRO 0, fp32        *model_states.pt of rank 0: module, optimizer                one master a parameter
    ZeRO 1, 2           *optim_states.pt: single_partition_of_fp32_groups            one flat partition a group
    ZeRO 3              *optim_states.pt: fp32_flat_groups                           one flat partition a sub-group

The pieces that every rank left (pretrain/pieces.py) say which elements of which parameter these are. Copies, such as those of replicas,
are read once. The files are opened with torch's weights-only unpickler under FakeTensorMode, which makes shapes and places in the file,
no values; values are then read from their place. A memory map would do too, but its pages count as resident memory.
Refused: pieces that do not make every parameter whole.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.checkpoint_files import CheckpointManifest
from pretrain.errors import Refusal
from pretrain.layout import Layout
from pretrain.pieces import Held, Pieces, pieces_file
from pretrain.stored import STEP, WEIGHT, Shape, rows_of

Run = tuple[int, int, Held]
"""A run of a shard's elements: the rank and the number of its master that have it, and where."""


def has_pieces(manifest: CheckpointManifest) -> bool:
    """Whether a checkpoint of a layout says what each of its ranks held."""
    names = {entry.name for entry in manifest.files}
    return all(pieces_file(rank) in names for rank in range(manifest.layout["world_size"]))


def rank_file(zero: int) -> str:
    """How the file of a rank ends that has its masters."""
    return "model_states.pt" if zero == 0 else "optim_states.pt"


class _Place(NamedTuple):
    """Where the values of a flat fp32 tensor begin."""

    file: BinaryIO
    offset: int


class LayoutTensors:
    """Of a checkpoint that DeepSpeed wrote: pretrain.stored.Stored."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._steps: dict[tuple[int, int], float] = {}
        self._places: dict[tuple[int, int, str], _Place] = {}
        """By rank, master, slot."""
        try:
            pieces = [self._read_pieces(rank) for rank in range(manifest.layout["world_size"])]
            self.shapes: Mapping[str, Shape] = pieces[0].shapes
            self._holders = self._check(_holders(pieces))
            for rank, own in enumerate(pieces[:1] if manifest.layout["zero"] == 0 else pieces):
                self._open_rank(rank, own, manifest)
        except BaseException:
            self._open.close()
            raise

    def slots(self, name: str) -> list[str]:
        """See Stored."""
        rank, master, _ = self._holders[name][0][0]
        kept = [slot for (*where, slot) in self._places if where == [rank, master]]
        return [*kept, *([STEP] if (rank, master) in self._steps else [])]

    def step(self, name: str) -> float:
        """See Stored."""
        rank, master, _ = self._holders[name][0][0]
        return self._steps[rank, master]

    def rows(self, name: str, slot: str, first: int, stop: int) -> Tensor:
        """See Stored."""
        shape, shards = self.shapes[name], self._holders[name]
        dim, cut = shards[0][0][2].dim, len(shards)
        out = torch.empty(stop - first, *shape[1:])
        if dim == 1 and cut > 1:
            columns = shape[1] // cut
            for shard, part in enumerate(out.chunk(cut, dim=1)):
                own = torch.empty(stop - first, columns)
                self._read(name, slot, shard, first * columns, own)
                part.copy_(own)
            return out.view(-1, *shape[1:])
        height, row = rows_of(shape) // cut, prod(shape[1:])
        for shard in range(first // height, -(-stop // height)):
            low, high = max(first, shard * height), min(stop, (shard + 1) * height)
            self._read(name, slot, shard, (low - shard * height) * row, out[low - first : high - first])
        return out

    def _read(self, name: str, slot: str, shard: int, start: int, out: Tensor) -> None:
        """Elements from `start` of a shard, in its flat order, into the contiguous `out`."""
        flat, stop = out.view(-1), start + out.numel()
        for rank, master, held in self._holders[name][shard]:
            low, high = max(start, held.start), min(stop, held.stop)
            if low < high:
                _read_into(flat[low - start : high - start], self._places[rank, master, slot], held.offset + low - held.start)

    def _read_pieces(self, rank: int) -> Pieces:
        path = self.folder / pieces_file(rank)
        try:
            return Pieces.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"{path} does not say what rank {rank} held ({error}): the layout cannot be changed from this checkpoint."
            ) from error

    def _check(self, holders: dict[str, list[list[Run]]]) -> dict[str, list[list[Run]]]:
        for name, shape in self.shapes.items():
            shards = holders.get(name, [])
            size = prod(shape) // max(len(shards), 1)
            for runs in shards or [[]]:
                ends = [0, *(held.stop for *_, held in runs)]
                if [held.start for *_, held in runs] != ends[:-1] or ends[-1] != size:
                    raise Refusal(
                        f"The ranks' pieces in {self.folder} do not make {name} whole: its pieces files are not of one checkpoint. Resume "
                        f"from another checkpoint, or with the layout this one was written by."
                    )
        return holders

    def _open_rank(self, rank: int, pieces: Pieces, manifest: CheckpointManifest) -> None:
        suffix = rank_file(manifest.layout["zero"])
        names = [entry.name for entry in manifest.files if entry.rank == rank and entry.name.endswith(suffix)]
        if len(names) != 1:
            raise Refusal(
                f"{self.folder} has {len(names)} files of rank {rank} that end in {suffix}, where one is expected: copy it again, whole."
            )
        file = self._open.enter_context((self.folder / names[0]).open("rb", buffering=0))
        masters, states = _flat_tensors(self.folder / names[0], pieces)
        for master, tensor in enumerate(masters):
            self._places[rank, master, WEIGHT] = _Place(file, _offset(tensor))
            for slot, value in states.get(master, {}).items():
                if slot == STEP:
                    self._steps[rank, master] = float(_read_into(torch.empty(1), _Place(file, _offset(value)), 0))
                else:
                    self._places[rank, master, slot] = _Place(file, _offset(value))

    def __enter__(self) -> LayoutTensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()


def _holders(pieces: list[Pieces]) -> dict[str, list[list[Run]]]:
    """By parameter and shard: the runs that make it up, as (rank, master, held), in order.

    Copies (of tensor ranks that hold a parameter whole, of a table on two stages, of ZeRO 0's replicas) are left out: the first
    stage's, tensor rank's and replica's are taken.
    """
    stored = pieces[0].layout
    layout = Layout(stored["pipeline"], stored["data"], stored["tensor"])
    found: defaultdict[str, dict[int, tuple[tuple[int, int], list[Run]]]] = defaultdict(dict)
    for rank, own in enumerate(pieces):
        where = layout.coordinates(rank)
        if stored["zero"] == 0 and where.data:
            continue
        for master, helds in enumerate(own.masters):
            for held in helds:
                party, runs = found[held.name].setdefault(held.shard, ((where.pipe, where.tensor), []))
                if party == (where.pipe, where.tensor):
                    runs.append((rank, master, held))
    return {name: [sorted(shards[shard][1], key=lambda run: run[2].start) for shard in sorted(shards)] for name, shards in found.items()}


def _flat_tensors(path: Path, pieces: Pieces) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """The masters in a rank's file and the optimizer's state by number of master: tensors without values, that know their place."""
    from pretrain.checkpoint_engine import SAFE_CLASSES

    with FakeTensorMode(), torch.serialization.safe_globals(SAFE_CLASSES):
        stored: dict[str, Any] = torch.load(path, weights_only=True)
    if pieces.layout["zero"] == 0:  # a master is a parameter
        return [stored["module"][held.name] for master in pieces.masters for held in master], stored["optimizer"]["state"]
    wrapper = stored["optimizer_state_dict"]
    if pieces.layout["zero"] == 3:
        return wrapper["fp32_flat_groups"], wrapper["optimizer_state_dict"]["state"]
    return wrapper["single_partition_of_fp32_groups"], wrapper["base_optimizer_state"]["state"]


def _offset(tensor: Tensor) -> int:
    """Where in its file the values of a tensor loaded under FakeTensorMode begin."""
    start: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise RuntimeError(
            f"a {tensor.dtype} tensor {tuple(tensor.shape)} at {start}, where contiguous fp32 with a known place is expected"
        )
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _read_into(out: Tensor, place: _Place, first: int) -> Tensor:
    """Fills the contiguous fp32 `out` from element `first` of a place on."""
    view, at = out.numpy().data.cast("B"), place.offset + 4 * first
    while view:
        count = os.preadv(place.file.fileno(), [view], at)
        if count == 0:
            raise OSError(f"{place.file.name} ends before its tensors do")
        view, at = view[count:], at + count
    return out
