"""DeepSpeed's checkpoint engine, ours: what it loads cannot run code, what it saves is on the disk, and it never fails alone.

DeepSpeed's own engine loads with `weights_only=False`: a pickle in a checkpoint folder runs as the user. Here every load goes through
torch's weights-only unpickler, which builds tensors, plain containers and the classes of `SAFE_CLASSES`, and nothing else. These are
what DeepSpeed 0.19.8 puts into ZeRO state dicts of stages 0 to 3 in fp32 and bf16: three data holders without side effects.

`engine.save_checkpoint` is full of collectives. A rank whose disk is full must not leave it by an exception while the others wait:
here a failed write is remembered in `failure`, the rest of the writes are skipped, and the caller asks all ranks afterwards.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pretrain import durable

SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


class DurableCheckpointEngine(CheckpointEngine):
    """Put it at `engine.checkpoint_engine`. `written` lists the files of the present save, `failure` the first error in it."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "DurableCheckpointEngine"
        self.written: list[Path] = []
        self.failure: Exception | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed's announcement of a save; nothing to do, `start` was called before."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """DeepSpeed's word that every rank has written; the manifest and the rename follow in pretrain.checkpoint."""
        return True

    def start(self) -> None:
        """Forgets the save before."""
        self.written, self.failure = [], None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder, or remembers why it could not."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes and fsyncs one file, or remembers why it could not."""
        if self.failure is not None:
            return
        try:
            durable.write(Path(path), lambda file: torch.save(state_dict, file))
            if content := unsafe_content(Path(path)):
                raise TypeError(f"the state holds {content}, which could be saved but not loaded again")
            self.written.append(Path(path))
        except Exception as error:  # whatever it is, the other ranks are waiting; it is raised once they know
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Tensors, plain containers and SAFE_CLASSES; raises pickle.UnpicklingError at anything else, having run none of it."""
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


def unsafe_content(path: Path) -> str | None:
    """What in the file the weights-only unpickler would refuse, found without loading it; None when there is nothing.

    Asked before a load, so that all ranks refuse together instead of one leaving the others in a collective.
    """
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        return f"a pickle that is not torch's present format ({error})"
    return ", ".join(sorted(names)) or None
