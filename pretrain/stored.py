"""The tensors of a checkpoint by parameter name, whatever layout wrote it: fp32 weights, and what the optimizer keeps of each.

    slot    weight         the fp32 master
            exp_avg ...    as MuonAdamW keeps them; `step` is a number
            ema            the moving average of the weights

`open_stored` gives one reader for both forms a checkpoint has:

    of a layout    DeepSpeed's flat partitions, put together (pretrain/stored_layout.py)
    canonical      whole tensors in safetensors files (pretrain/canonical.py)

A reader is asked for rows of a parameter, and its memory is what was asked for: a conversion holds a tensor at a time, a rank of another
layout what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from pretrain.canonical import AVERAGE, OPTIMIZER, WEIGHTS
from pretrain.checkpoint_files import CheckpointManifest
from pretrain.errors import Refusal
from pretrain.tensor_files import TensorFiles, holds

WEIGHT, EMA, STEP = "weight", "ema", "step"

Shape = tuple[int, ...]


class Stored(Protocol):
    """A checkpoint's tensors. A context manager."""

    shapes: Mapping[str, Shape]
    """Every parameter, whole."""

    def slots(self, name: str) -> list[str]:
        """What is kept of a parameter, `weight` first."""

    def rows(self, name: str, slot: str, first: int, stop: int) -> Tensor:
        """Rows first:stop of it in fp32; a vector's rows are its elements. Not for `step`."""

    def step(self, name: str) -> float:
        """The `step` of it."""

    def __enter__(self) -> Stored: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_stored(folder: Path, manifest: CheckpointManifest) -> Stored:
    """The reader of a checkpoint that was verified. Raises Refusal for one that says too little of its layout, or does not add up."""
    if not manifest.layout:
        return CanonicalTensors(folder)
    from pretrain.stored_layout import LayoutTensors  # it builds on this file

    return LayoutTensors(folder, manifest)


def rows_of(shape: Shape) -> int:
    """Of a parameter: its first size, 1 for a number."""
    return shape[0] if shape else 1


class CanonicalTensors:
    """Of a canonical checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._files: dict[str, TensorFiles] = {}
        try:
            for stem in (WEIGHTS, AVERAGE, OPTIMIZER):
                if stem == WEIGHTS or holds(folder, stem):
                    self._files[stem] = self._open.enter_context(TensorFiles(folder, stem))
            self.shapes: Mapping[str, Shape] = {name: tuple(tensor.shape) for name, tensor in self._files[WEIGHTS].shapes.items()}
            self._slots = self._check(folder)
        except BaseException:
            self._open.close()
            raise

    def _check(self, folder: Path) -> dict[str, dict[str, tuple[str, str]]]:
        """By parameter and slot: stem and tensor."""
        slots: dict[str, dict[str, tuple[str, str]]] = {name: {WEIGHT: (WEIGHTS, name)} for name in self.shapes}
        for stem, own in self._files.items():
            for tensor, like in own.shapes.items() if stem != WEIGHTS else ():
                name, _, slot = tensor.rpartition("/") if stem == OPTIMIZER else (tensor, "", EMA)
                fits = name in slots and tuple(like.shape) == (() if slot == STEP else self.shapes[name])
                if not fits:
                    what = f"its shape {tuple(like.shape)} is not the parameter's" if name in slots else "there is no such parameter"
                    raise Refusal(f"{stem} in {folder} holds {tensor}, but {what}: these files are not of one checkpoint.")
                slots[name][slot] = (stem, tensor)
        return slots

    def slots(self, name: str) -> list[str]:
        """See Stored."""
        return list(self._slots[name])

    def step(self, name: str) -> float:
        """See Stored."""
        stem, tensor = self._slots[name][STEP]
        return float(self._files[stem].read(tensor))

    def rows(self, name: str, slot: str, first: int, stop: int) -> Tensor:
        """See Stored."""
        stem, tensor = self._slots[name][slot]
        if not self.shapes[name]:
            return self._files[stem].read(tensor).view(1)[first:stop].float()
        return self._files[stem].read_rows(tensor, first, stop).float()

    def __enter__(self) -> CanonicalTensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
