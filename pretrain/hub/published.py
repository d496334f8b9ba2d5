"""`attractor import`: published weights, or an export of ours, as a run folder that evaluates, exports and can be trained on.

    RUN/config.yaml       a recipe with the model's architecture; data, budget and optimizer are the user's to set
    RUN/tokenizer.json    the model's, where one was found
    RUN/imported.json     where it came from: files and their hashes, the original configuration word for word
    RUN/checkpoints/step-00000000/    the weights alone, fp32 (pretrain/canonical.py): training begins with a fresh optimizer

The numbers are those of the published forward: see published_names.py for names, published_config.py for options.
A tensor is in memory at a time, and a shard while it is written. Everything is written beside RUN, then renamed: RUN is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from data_pipeline import open_manifest
from data_pipeline.token_bytes import tokenizer_file
from data_pipeline.tokenizer import begin_id, fingerprint, read_tokenizer_json, tokenizer_from_json
from model.config import ModelConfig
from model.language_model import build
from pretrain import durable
from pretrain.canonical import WEIGHTS, Source, write_canonical
from pretrain.config import Recipe
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.hub import export_config
from pretrain.hub.published_config import read_config
from pretrain.hub.published_files import Published, open_published
from pretrain.hub.published_names import EMBEDDING, HEAD, TABLE, parameters_of, parts_of, refuse_misfits, rotary_base, with_base
from pretrain.loaded import refuse_larger, refuse_misfit, refuse_other_tensors
from pretrain.run_folder import CHECKPOINTS, CONFIG, IMPORTED, TOKENIZER, dump
from pretrain.training_state import TrainingState

_STEPS = 1000
"""Of the budget that a recipe must state, until the user states another."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What is to be imported, whatever it was."""

    architecture: ModelConfig
    shapes: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    sequence_length: int
    precision: str = "bf16"
    optimizer: dict[str, float] = field(default_factory=dict)


def import_run(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    data: str | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes the run folder `out` from what lies at `source`, and returns what was imported.

    tokenizer: the model's tokenizer.json, where `source` has none. data: a prepared set to evaluate and train on. progress: told the share
    of the bytes written. Raises Refusal for bad input, RunStopped (code 5) when the disk refuses; then there is no `out`.
    """
    if os.path.lexists(out):
        raise Refusal(f"{out} is there already, and an import writes a new run folder. Choose another --out, or move that one away.")
    with closing(open_published(source)) as opened:
        model = _own(opened) if opened.own else _published(opened)
        recipe = _recipe(model, out, data)
        text, notes = _tokenizer(source, tokenizer, data, model.architecture.model.vocabulary_size or 0)
        if (length := recipe.data.sequence_length) != model.sequence_length:
            notes.append(f"The model was trained on sequences of {model.sequence_length:,} tokens; the run takes {length:,}, as the data.")
        _write(out, recipe, text, _provenance(source, opened), Source(model.shapes, model.read), progress)
    return {
        "run": str(out),
        "source": str(source),
        "kind": model.architecture.model.kind,
        "parameters": sum(tensor.numel() for tensor in model.shapes.values()),
        "tensors": len(opened.shapes),
        "vocabulary_size": model.architecture.model.vocabulary_size,
        "sequence_length": length,
        "tokenizer": text is not None,
        "data": data,
        "notes": notes,
    }


def _provenance(source: Path, opened: Published) -> dict[str, Any]:
    """Where it came from, for imported.json."""
    return {
        "source": str(source.resolve()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": {path.name: durable.sha256(path) for path in (opened.config_file, *opened.files)},
        "config": opened.config,
    }


def _published(opened: Published) -> _Model:
    """Weights by their published names, under ours. Raises Refusal for what does not fit its configuration."""
    where = opened.files[0]
    model = read_config(opened.config, opened.config_file)
    refuse_larger(model.architecture, opened.shapes, where)
    parts = parts_of(model)
    refuse_misfits(model, parts, opened.shapes, where)
    m = model.architecture.model
    if TABLE in opened.shapes:
        model = with_base(model, rotary_base(opened.read(TABLE), m.rope_base, m.head_dim, where))
    if m.tied_embeddings and HEAD in opened.shapes and not torch.equal(opened.read(HEAD), opened.read(EMBEDDING)):
        raise Refusal(
            f"{where} has a {HEAD} that differs from {EMBEDDING}, and its configuration says that they are one matrix (tie_embeddings). "
            f"Weights and configuration are not of one model: copy both again from its source."
        )

    def read(name: str) -> Tensor:
        part = parts[name]
        return part.change(opened.read(part.source).float())

    return _Model(
        architecture=model.architecture,
        shapes=parameters_of(model.architecture),
        read=read,
        sequence_length=model.block_size,
        optimizer=model.optimizer,
    )


def _own(opened: Published) -> _Model:
    """An export of ours: its configuration holds our sections, its names are canonical. Raises Refusal for what is none."""
    stated = export_config.read_config(opened.config_file)
    refuse_larger(stated.architecture, opened.shapes, opened.config_file.parent)
    wanted = dict(build(stated.architecture, device="meta").named_parameters())
    refuse_other_tensors(wanted, dict(opened.shapes), opened.config_file.parent)
    return _Model(
        architecture=stated.architecture,
        shapes=parameters_of(stated.architecture),
        read=lambda name: opened.read(name).float(),
        sequence_length=stated.sequence_length,
        precision="fp32" if stated.dtype == "float32" else "bf16",
    )


def _recipe(model: _Model, out: Path, data: str | None) -> Recipe:
    """The architecture with the defaults of everything else; sequences as long as the data's windows, without data as the model's.

    Raises Refusal for data that does not fit the embedding.
    """
    sections = {name: asdict(part) for name, part in vars(model.architecture).items()}
    manifest = None if data is None else open_manifest(data)
    length = model.sequence_length if manifest is None else manifest.sequence_length
    tree = {
        "run": {"name": out.name, "dir": str(out)},
        "data": {"path": data, "sequence_length": length},
        **sections,
        "train": {"tokens": _STEPS * 256 * length, "global_batch": 256, "precision": model.precision},
        "optimizer": model.optimizer,
    }
    if model.architecture.model.loops:
        tree["evaluation"] = {"iterations": [1, 2, 4, 16, "auto"]}
    recipe = Recipe.from_yaml(yaml.safe_dump(tree), "the imported configuration")
    return recipe if manifest is None else recipe.completed(manifest.vocabulary_size, length, str(data))


def _tokenizer(source: Path, given: Path | None, data: str | None, rows: int) -> tuple[str | None, list[str]]:
    """The text of the model's tokenizer.json, if there is one, and what is to be said of it. Raises Refusal for one that does not fit."""
    beside = (source if source.is_dir() else source.parent) / TOKENIZER
    file = given or (beside if beside.is_file() else tokenizer_file(data) if data else None)
    if file is None:
        return None, [
            f"No tokenizer was found: the run can be trained on (with data), and it cannot be evaluated on text, export or generate until "
            f"its {TOKENIZER} lies in the run folder. Import again with --tokenizer FILE, or put the file there."
        ]
    text = read_tokenizer_json(file)
    tokenizer = tokenizer_from_json(text, str(file))
    refuse_misfit(tokenizer, rows, file)
    if data is not None and (found := open_manifest(data).tokenizer_fingerprint) != fingerprint(text):
        raise Refusal(
            f"The data at {data} was prepared with another tokenizer ({found[:12]}) than {file} ({fingerprint(text)[:12]}): its ids mean "
            f"other pieces of text. Prepare it with the model's: attractor data prepare SOURCE --out DIR --tokenizer {file}."
        )
    notes = []
    if given is None and not beside.is_file():
        notes.append(
            "The model came without a tokenizer; that of the data was taken. If it was trained with another, its losses mean nothing."
        )
    try:
        begin_id(tokenizer, str(file))
    except Refusal as error:
        notes.append(f"{error} Until then the run can be trained on, but not generate or answer tasks.")
    return text, notes


def _write(
    out: Path, recipe: Recipe, tokenizer: str | None, provenance: dict[str, Any], weights: Source, progress: Callable[[float], None]
) -> None:
    """Everything beside `out`, then its name. Raises RunStopped (code 5) when the disk refuses."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        durable.write_text(partial / CONFIG, recipe.to_yaml())
        durable.write_text(partial / IMPORTED, dump(provenance, indent=1) + "\n")
        if tokenizer is not None:
            durable.write_text(partial / TOKENIZER, tokenizer)
        state = TrainingState(tokens=0, config=recipe.model_dump(mode="json"))
        write_canonical(partial / CHECKPOINTS, 0, state, {WEIGHTS: weights}, progress)
        durable.fsync_folder(partial)
        partial.rename(out)
        durable.fsync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunStopped(
            f"The run folder {out} could not be written: {error.strerror or error}. Nothing is left of it. Make room there, or choose "
            f"another --out.",
            BAD_CHECKPOINT_WRITE,
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
