"""A checkpoint of no layout: whole fp32 tensors by parameter name in safetensors files, for any layout and for readers without one.

    step-00000100/
        manifest.json            every other file with its size and sha256; its `layout` is empty
        state.json               everything but tensors (pretrain/training_state.py)
        weights*.safetensors     the fp32 masters                                     one file, or shards with an index
        average*.safetensors     their moving average, where the run keeps one        (pretrain/tensor_files.py)
        optimizer*.safetensors   PARAMETER/SLOT: exp_avg, exp_avg_sq and step of AdamW, momentum_buffer of Muon

Weights alone are a whole checkpoint: what comes from elsewhere has no optimizer state, and training starts one. Random states are of a
rank, so there are none. `write_canonical` streams: a few shards are in memory, never the whole. It is published as every checkpoint is:
files, fsync, manifest, rename, pointer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import checkpoint_files as files
from pretrain import durable
from pretrain.checkpoint_files import CheckpointManifest, FileEntry
from pretrain.errors import BAD_CHECKPOINT_WRITE, RunStopped
from pretrain.tensor_files import in_order, write_tensors
from pretrain.training_state import STATE, TrainingState

WEIGHTS, AVERAGE, OPTIMIZER = "weights", "average", "optimizer"
"""Stems of a checkpoint's tensor files; one of a layout has the first two, in the precision it was trained in."""
CANONICAL: dict[str, int] = {}
"""What the manifest of a canonical checkpoint says of its layout."""
AHEAD_BYTES = 1 << 30
"""Read and not yet written at most, besides the shard that is being written."""


class Source(NamedTuple):
    """Tensors to be written: their names, shapes and dtypes, and how to get one."""

    shapes: Mapping[str, Tensor]
    """Only shape and dtype are read: tensors of the meta device do."""
    read: Callable[[str], Tensor]
    """The tensor of that name, on the CPU. Asked once for each, as `in_order` has them, from another thread."""


def write_canonical(
    folder: Path,
    step: int,
    state: TrainingState,
    sources: Mapping[str, Source],
    progress: Callable[[float], None] = lambda _: None,
    confirm: Callable[[], object] = lambda: None,
) -> Path:
    """Writes checkpoint `step` into `folder` (RUN/checkpoints) and moves `latest` to it; returns its folder. One process.

    sources: by stem; "weights" is required, "average" and "optimizer" are not. progress: told the share of the bytes done. confirm:
    asked when all is written and before it takes its name; what it raises ends the attempt.
    Raises RunStopped (code 5) when the disk refuses; then, as after any other error, nothing is left of it and `latest` stands.
    """
    if WEIGHTS not in sources:
        raise ValueError("a checkpoint without weights")
    try:
        partial = files.start_partial(folder, step)
        entries = _write(partial, state, sources, progress)
        confirm()
        files.write_manifest(partial, CheckpointManifest(step, CANONICAL, {"torch": torch.__version__}, entries))
        return files.publish(folder, step)
    except OSError as error:
        files.abandon_partial(folder, step)
        raise RunStopped(
            f"The checkpoint of step {step} could not be written to {folder}: {error.strerror or error}. What was written of it has been "
            f"removed; nothing else was touched. Make room there, then give the command again.",
            BAD_CHECKPOINT_WRITE,
        ) from error
    except BaseException:
        files.abandon_partial(folder, step)
        raise


def _write(partial: Path, state: TrainingState, sources: Mapping[str, Source], progress: Callable[[float], None]) -> list[FileEntry]:
    """Reading, writing and hashing go on at once: each waits for another part of the machine."""
    sizes = {stem: sum(tensor.nbytes for tensor in source.shapes.values()) for stem, source in sources.items()}
    whole, done = max(sum(sizes.values()), 1), 0
    hashes: dict[Path, Future[FileEntry]] = {}
    with ThreadPoolExecutor(1, "hash") as hashing, ThreadPoolExecutor(1, "read") as reading:

        def written(share: float) -> None:
            """Told after every shard: those that are new are whole."""
            for path in sorted(partial.iterdir()):
                if path not in hashes:
                    hashes[path] = hashing.submit(files.describe, path, 0)
            progress((done + share * sizes[stem]) / whole)

        try:
            durable.write_text(partial / STATE, state.to_json())
            for stem, source in sources.items():
                write_tensors(partial, stem, source.shapes, _Ahead(source, reading).read, progress=written)
                written(1.0)  # the index too
                done += sizes[stem]
            return [hashes[path].result() for path in sorted(hashes)]
        except BaseException:
            for pool in (hashing, reading):
                pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Ahead:
    """A source read by another thread, AHEAD_BYTES before its tensors are asked for."""

    def __init__(self, source: Source, reading: ThreadPoolExecutor) -> None:
        self._source, self._reading = source, reading
        self._names = iter(in_order(source.shapes))
        self._waiting: deque[tuple[int, Future[Tensor]]] = deque()

    def read(self, name: str) -> Tensor:
        self._fill()
        tensor = self._waiting.popleft()[1].result()
        self._fill()
        return tensor

    def _fill(self) -> None:
        while sum(size for size, _ in self._waiting) < AHEAD_BYTES and (name := next(self._names, None)) is not None:
            self._waiting.append((self._source.shapes[name].nbytes, self._reading.submit(self._source.read, name)))
