"""Whole parameters, and what the optimizer keeps of them, out of the files that DeepSpeed's ranks wrote.

    file of a rank      holds its masters and the optimizer's state of each          where there
    ZeRO 0, fp32        *model_states.pt of rank 0: module, optimizer                one master a parameter
    ZeRO 1, 2           *optim_states.pt: single_partition_of_fp32_groups            one flat partition a group
    ZeRO 3              *optim_states.pt: fp32_flat_groups                           one flat partition a sub-group

The pieces that every rank left (pretrain/pieces.py) say which elements of which parameter these are. Copies, such as those of replicas,
are read once. The files are opened with torch's weights-only unpickler under FakeTensorMode, which makes shapes and places in the file,
no values; values are then read from their place. A memory map would do too, but its pages count as resident memory.
Refused, before a value is read: pieces that do not make every parameter whole once, or that lie outside of what their rank's file holds.
"""

from __future__ import annotations

import os
import pickle
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
    """Where the values of an fp32 tensor begin, and how many they are."""

    file: BinaryIO
    offset: int
    size: int


class LayoutTensors:
    """Of a checkpoint that DeepSpeed wrote: pretrain.stored.Stored."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._steps: dict[tuple[int, int], float] = {}
        self._places: dict[tuple[int, int, str], _Place] = {}
        """By rank, master, slot."""
        try:
            pieces = [self._read_pieces(rank, manifest) for rank in range(manifest.layout["world_size"])]
            self.shapes: Mapping[str, Shape] = pieces[0].shapes
            self._holders = _holders(pieces)
            self._check_whole()
            for rank, own in enumerate(pieces[:1] if manifest.layout["zero"] == 0 else pieces):
                self._open_rank(rank, own, manifest)
            self._check_places()
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

    def _read_pieces(self, rank: int, manifest: CheckpointManifest) -> Pieces:
        path = self.folder / pieces_file(rank)
        try:
            pieces = Pieces.from_json(path.read_text(encoding="utf-8"))
            if pieces.layout != manifest.layout:
                raise ValueError(f"it is of the layout {pieces.layout}, and the checkpoint of {manifest.layout}")
            if Layout(pieces.layout["pipeline"], pieces.layout["data"], pieces.layout["tensor"]).ranks != manifest.layout["world_size"]:
                raise ValueError(f"{pieces.layout} is no layout")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Refusal(
                f"{path} does not say what rank {rank} held ({error}): the layout cannot be changed from this checkpoint."
            ) from error
        return pieces

    def _check_whole(self) -> None:
        """Every parameter is there whole: all its shards, and of each every element once."""
        for name in self._holders.keys() | self.shapes.keys():
            if name not in self.shapes or not _whole(self._holders.get(name, []), self.shapes[name]):
                raise self._torn(f"do not make {name} whole")

    def _check_places(self) -> None:
        """Every piece lies in what its rank's file holds, and all pieces of a parameter have the same slots."""
        for name, shards in self._holders.items():
            slots = self.slots(name)
            for rank, master, held in (run for shard in shards for run in shard):
                places = [self._places.get((rank, master, slot)) for slot in slots if slot != STEP]
                end = held.offset + held.stop - held.start
                if (STEP in slots) != ((rank, master) in self._steps) or any(place is None or end > place.size for place in places):
                    raise self._torn(f"say that rank {rank} holds {name} where its file holds something else")

    def _torn(self, how: str) -> Refusal:
        return Refusal(
            f"The ranks' pieces in {self.folder} {how}: its pieces files are not of one checkpoint. Resume from another checkpoint, or "
            f"with the layout this one was written by."
        )

    def _open_rank(self, rank: int, pieces: Pieces, manifest: CheckpointManifest) -> None:
        suffix = rank_file(manifest.layout["zero"])
        names = [entry.name for entry in manifest.files if entry.rank == rank and entry.name.endswith(suffix)]
        if len(names) != 1:
            raise Refusal(
                f"{self.folder} has {len(names)} files of rank {rank} that end in {suffix}, where one is expected: copy it again, whole."
            )
        file = self._open.enter_context((self.folder / names[0]).open("rb", buffering=0))
        try:
            masters, states = _flat_tensors(self.folder / names[0], pieces)
            for master, tensor in enumerate(masters):
                self._places[rank, master, WEIGHT] = _place(file, tensor)
                for slot, value in states.get(master, {}).items():
                    if slot == STEP:
                        self._steps[rank, master] = float(_read_into(torch.empty(1), _place(file, value), 0))
                    else:
                        self._places[rank, master, slot] = _place(file, value)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise Refusal(
                f"{self.folder / names[0]} does not hold an optimizer's state as ZeRO stage {manifest.layout['zero']} leaves it "
                f"({type(error).__name__}: {error}). Resume from another checkpoint, or with the layout this one was written by."
            ) from error

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


def _whole(shards: list[list[Run]], shape: Shape) -> bool:
    """Whether these runs, each shard's in order, are all elements of a parameter, once."""
    if not shards or not shards[0]:
        return False
    _, dim, cut, *_ = shards[0][0][2]
    if cut != len(shards) or (cut > 1 and (dim not in (0, 1) or dim >= len(shape) or shape[dim] % cut)):
        return False
    for number, runs in enumerate(shards):
        ends = [0, *(held.stop for *_, held in runs)]
        if [held.start for *_, held in runs] != ends[:-1] or ends != sorted(ends) or ends[-1] != prod(shape) // cut:
            return False
        if any((held.dim, held.shards, held.shard) != (dim, cut, number) for *_, held in runs):
            return False
    return True


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


def _place(file: BinaryIO, tensor: Tensor) -> _Place:
    """Where the values of a tensor are that was loaded under FakeTensorMode."""
    start: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"a {tensor.dtype} tensor {tuple(tensor.shape)} at {start}, where contiguous fp32 with a known place is expected")
    return _Place(file, start + int(tensor.storage_offset()) * tensor.element_size(), tensor.numel())


def _read_into(out: Tensor, place: _Place, first: int) -> Tensor:
    """Fills the contiguous fp32 `out` from element `first` of a place on."""
    view, at = out.numpy().data.cast("B"), place.offset + 4 * first
    while view:
        try:
            count = os.preadv(place.file.fileno(), [view], at)
        except OSError as error:
            raise Refusal(f"{place.file.name} cannot be read: {error.strerror}. Copy the checkpoint to a disk that can be.") from error
        if count == 0:
            raise Refusal(f"{place.file.name} ends before its tensors do: it is cut short. Copy it again, whole.")
        view, at = view[count:], at + count
    return out
