"""Each validation document's loss under a run's newest checkpoint, on the whole validation split, kept in files for the next time.

Which document a prediction belongs to is known exactly, across windows too. The windows of a split are one row of ids cut up
(data_pipeline/packing.py), and each document begins with the begin token, which no text can forge: so with `before` the begin tokens in
all earlier windows,

    document of position t = before + documents[t],    before += documents[S - 1] + (last target is the begin token)

A document owns the predictions made from its tokens: its last one is of the next document's begin token (that it ends). The first id of a
window is predicted by nobody; a document with no prediction at all is left out.

    DIR/documents-KEY.npz    nll [D] (nats, summed), tokens [D] (predicted), depth; KEY: hash of checkpoint, model, depth, precision, data
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain import checkpoint_files as files
from pretrain.compare_records import RunRecord
from pretrain.errors import Refusal
from pretrain.run_folder import CHECKPOINTS


@dataclass(frozen=True)
class Checkpoint:
    """What is evaluated of a run: its newest whole checkpoint at the run's own depth."""

    run: RunRecord
    step: int
    key: str


@dataclass(frozen=True)
class DocumentLosses:
    """nll: nats summed over each document's predictions [D]; tokens: how many those are [D]; depth: as evaluations call it."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    depth: str


def newest_checkpoints(runs: Sequence[RunRecord]) -> list[Checkpoint]:
    """Of every run. Raises Refusal where one has none that is whole, or its validation data cannot be read."""
    from pretrain.runtime import device_of, settle_libraries

    settle_libraries(device_of("auto"))
    from pretrain.checkpoint import newest_whole
    from pretrain.evaluate import validation_loader

    found = []
    for run in runs:
        try:
            manifest = files.read_manifest(newest_whole(run.path / CHECKPOINTS))
            validation_loader(run.recipe, 0, 1, None)  # looks at every shard's size: refused now, not after the first run's evaluation
        except Refusal as error:
            raise Refusal(f"{error} Or add --no-evaluate: the records are then compared without intervals by document.") from error
        found.append(Checkpoint(run, manifest.step, _key(run, manifest)))
    return found


def _key(run: RunRecord, manifest: files.CheckpointManifest) -> str:
    said = {
        "files": {entry.name: entry.sha256 for entry in manifest.files if entry.name.endswith(".safetensors")},
        "model": asdict(run.recipe.architecture),
        "depth": run.own_depth,
        "precision": run.recipe.train.precision,
        "mask_documents": run.recipe.data.mask_documents,
        "data": run.validation_split.index_sha256,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def document_losses(checkpoint: Checkpoint, out: Path, progress: Callable[[float], None]) -> DocumentLosses:
    """From the file in `out`, or else evaluated and written there. Progress is told as a share of this run."""
    kept = out / f"documents-{checkpoint.key}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as arrays:
            found = DocumentLosses(arrays["nll"], arrays["tokens"], str(arrays["depth"]))
    else:
        found = _evaluate(checkpoint.run, progress)
        arriving = out / f".documents-{checkpoint.key}.{os.getpid()}.npz"
        np.savez(arriving, nll=found.nll, tokens=found.tokens, depth=found.depth)
        arriving.rename(kept)
    progress(1.0)
    return found


def _evaluate(run: RunRecord, progress: Callable[[float], None]) -> DocumentLosses:
    import torch

    from pretrain.evaluate import forward, validation_loader
    from pretrain.loaded import load_run

    loaded = load_run(run.path)
    loader = validation_loader(loaded.recipe, 0, 1, None)
    documents, before = run.validation_split.documents, 0
    nll, counts = np.zeros(documents), np.zeros(documents, np.int64)
    for number, batch in enumerate(loader, 1):
        owners, before = number_documents(batch.documents.numpy(), batch.targets.numpy(), run.manifest.bos_id, before)
        with torch.no_grad():
            (found,) = forward(loaded.model, [batch], [run.own_depth], loaded.device, mask_documents=loaded.recipe.data.mask_documents)
        ((key, losses),) = ((key, value) for key, value in found[2].items() if key.startswith("nll/"))
        predicted = batch.targets.numpy() >= 0
        nll += np.bincount(owners[predicted], losses.double().cpu().numpy()[predicted], documents)
        counts += np.bincount(owners[predicted], minlength=documents)
        progress(number / len(loader))
    return DocumentLosses(nll, counts, key.removeprefix("nll/"))


def number_documents(documents: NDArray[np.int32], targets: NDArray[np.int64], bos_id: int, before: int) -> tuple[NDArray[np.int64], int]:
    """The document [B, S] of each position, from 0, over the whole split; and the begin tokens up to the end of these windows.

    documents, targets: of a batch [B, S], in stored order; before: the begin tokens of all earlier windows. What pads is numbered past
    the last document: use it only where there is a target.
    """
    begun = documents[:, -1] + (targets[:, -1] == bos_id)
    ends = before + np.cumsum(begun)
    return (documents + (ends - begun)[:, None] - 1).astype(np.int64), int(ends[-1])
