"""A run as a folder that transformers loads without this code, and such a folder back as a model here.

    OUT/config.json, generation_config.json, modeling_attractor.py       the architecture and its settings (export_config.py)
        model.safetensors, or shards and their index                     the weights, by their names in model/, in the checkpoint's types
        tokenizer.json, tokenizer_config.json, special_tokens_map.json   texts begin with the begin token (export_tokenizer.py)
        README.md, attractor.json                                        model card; where it comes from, with the hashes of its files

The order: everything is refused that can be; the trained model and the exported one are built over the same tensors and their logits
compared (export_check.py); then a hidden folder beside OUT is written, read back and made durable, and takes OUT's name. Whatever
stops it, there is a whole export or none. The model is mapped from the checkpoint; when writing, a shard and its copy are in memory.

A code-free export (`plain`) holds a stock architecture instead (export_plain.py). Pickles are neither written nor read.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import read_tokenizer_json
from model.config import ModelConfig
from model.cost import count_parameters
from pretrain import checkpoint_files, durable
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.hub.export_check import check_prompts, compare_logits, read_back
from pretrain.hub.export_config import CONFIG, config_document, read_config
from pretrain.hub.export_plain import Stock, plain_document, plain_tensors, stock_architecture
from pretrain.hub.export_tokenizer import PROMPT, ExportedTokenizer, export_tokenizer
from pretrain.hub.model_card import CardFacts, model_card, run_record
from pretrain.loaded import LoadedModel, LoadedRun, load_run, load_weights
from pretrain.run_folder import CHECKPOINTS, STARTS, TOKENIZER, dump
from pretrain.runtime import device_of, settle_libraries
from pretrain.tensor_files import TensorFiles, write_tensors

STEM = "model"
PROVENANCE, CARD, GENERATION = "attractor.json", "README.md", "generation_config.json"
MODELLING = Path(__file__).with_name("modeling_attractor.py")
FORMAT = 1
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_COMPARED, _WRITTEN = 0.4, 0.7
"""Shares of the progress that end with the comparison, and with writing."""

Progress = Callable[[float], None]


def export_run(
    run: Path, out: Path, *, solver_iterations: int | str = "auto", plain: bool = False, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Exports the newest whole checkpoint of a run (its average, where one is kept) to `out`, a folder that must not exist.

    Returns what was exported, as plain JSON. progress: told the share done. Raises Refusal for bad input,
    RunStopped (code 5) when the disk refuses; then there is no `out`.
    """
    began = time.monotonic()
    _refuse_target(out)
    settle_libraries(torch.device("cpu"))
    loaded = load_run(run, device=torch.device("cpu"), dtype=torch.float32)
    architecture, length = loaded.architecture, loaded.sequence_length
    stock = stock_architecture(architecture, solver_iterations) if plain else None
    where = loaded.find_tokenizer()
    tokenizer = export_tokenizer(read_tokenizer_json(where), str(where), architecture.model.vocabulary_size or 0, length)
    document = _document(loaded, stock, solver_iterations, tokenizer.begin_id)
    compared = _compare(loaded, stock, document, tokenizer)
    progress(_COMPARED)
    facts = CardFacts(
        recipe=loaded.recipe,
        step=loaded.step,
        which=loaded.which,
        parameters=count_parameters(architecture),
        solver_iterations=solver_iterations,
        begin=json.loads(tokenizer.files["special_tokens_map.json"])["bos_token"],
        sequence_length=length,
        compared=compared,
        stock=None if stock is None else stock.model_class,
        record=run_record(run, loaded.step),
    )
    checkpoint, stem = run / CHECKPOINTS / checkpoint_files.step_name(loaded.step), loaded.which.removesuffix(".safetensors")
    del loaded
    texts = {**tokenizer.files, **_texts(document, tokenizer, architecture.model.vocabulary_size or 0), CARD: model_card(facts)}
    if stock is None:
        texts[MODELLING.name] = MODELLING.read_text(encoding="utf-8")
    with TensorFiles(checkpoint, stem) as source:
        own = (source.shapes, source.read)
        shapes, read = own if stock is None else plain_tensors(architecture.model, stock, *own)
        size = _publish(out, texts, shapes, read, facts, tokenizer, run, progress)
    return {
        "out": str(out),
        "run": str(run),
        "step": facts.step,
        "weights": facts.which,
        "kind": architecture.model.kind,
        "class": document["architectures"][0],
        "code_free": plain,
        "solver_iterations": solver_iterations,
        "parameters": sum(tensor.numel() for tensor in shapes.values()),
        "bytes": size,
        "logit_difference": compared,
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _refuse_target(out: Path) -> None:
    if os.path.lexists(out):
        raise Refusal(f"{out} already exists. An export takes the place of nothing: give --out a folder that does not exist, or remove it.")
    if out.name in ("", ".", ".."):
        raise Refusal(f"--out {out} is no name for a new folder.")


def _document(loaded: LoadedRun, stock: Stock | None, depth: int | str, begin: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "sequence_length": loaded.sequence_length,
        "begin_id": begin,
        "dtype": _DTYPES[loaded.recipe.train.precision],
        "version": metadata.version("transformers"),
    }
    if stock is not None:
        return plain_document(loaded.architecture.model, stock, **options)
    return config_document(loaded.architecture, solver_iterations=depth, **options)


def _compare(loaded: LoadedRun, stock: Stock | None, document: dict[str, Any], tokenizer: ExportedTokenizer) -> dict[str, float]:
    """The largest difference of logits by depth. The exported model is built over the trained one's tensors."""
    model, architecture = loaded.model, loaded.architecture
    state = dict(model.state_dict())
    if stock is None:
        from pretrain.hub.modeling_attractor import AttractorConfig, AttractorForCausalLM

        with torch.device("meta"):
            exported = AttractorForCausalLM(AttractorConfig(**deepcopy(document)))
        exported.load_state_dict(state, assign=True)
    else:
        exported = _stock_model(architecture, stock, document, state)
    depths: tuple[int | str, ...] = (0,) if stock is not None or architecture.model.kind == "transformer" else (0, 1, "auto")
    prompts = check_prompts(architecture.model.vocabulary_size or 0, tokenizer.prompt, loaded.sequence_length)
    return compare_logits(model, exported.eval(), prompts, depths, plain=stock is not None)


def _stock_model(architecture: ModelConfig, stock: Stock, document: dict[str, Any], state: dict[str, Tensor]) -> Any:
    import transformers

    shapes, read = plain_tensors(architecture.model, stock, state, state.__getitem__)
    config = transformers.AutoConfig.for_model(**deepcopy(document))
    with torch.device("meta"):
        model = getattr(transformers, stock.model_class)(config)
    tied = {"lm_head.weight": state["embedding.weight"]} if architecture.model.tied_embeddings else {}
    model.load_state_dict({name: read(name) for name in shapes} | tied, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is in no file
    return model


def _texts(document: dict[str, Any], tokenizer: ExportedTokenizer, rows: int) -> dict[str, str]:
    """Configurations. Rows that pad the vocabulary stand for no token, and generation must not choose them."""
    begin, padding = tokenizer.begin_id, list(range(tokenizer.ids, rows))
    generation: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": begin, "pad_token_id": begin}
    generation |= {"suppress_tokens": padding} if padding else {}
    generation["transformers_version"] = document["transformers_version"]
    return {CONFIG: json.dumps(document, indent=2) + "\n", GENERATION: json.dumps(generation, indent=2) + "\n"}


def _publish(
    out: Path,
    texts: Mapping[str, str],
    shapes: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    facts: CardFacts,
    tokenizer: ExportedTokenizer,
    run: Path,
    progress: Progress,
) -> int:
    """Writes, reads back, names. Returns the bytes of the weights. Raises RunStopped when the disk refuses; then nothing is left."""
    folder = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)  # of an export that was killed
        _refuse_full_disk(out.parent, sum(tensor.nbytes for tensor in shapes.values()))
        folder.mkdir()
        files = write_tensors(folder, STEM, shapes, read, progress=_part(progress, _COMPARED, _WRITTEN))
        for name, text in texts.items():
            durable.write_text(folder / name, text)
        _refuse_changed_tokenizer(folder, tokenizer)
        hashes = read_back(folder, files, shapes, read, _part(progress, _WRITTEN, 1.0))
        durable.write_text(folder / PROVENANCE, _provenance(facts, run, hashes))
        durable.fsync_folder(folder)
        _refuse_target(out)  # another export may have come first
        folder.rename(out)
        durable.fsync_folder(out.parent)
        return sum((out / file.name).stat().st_size for file in files)
    except OSError as error:
        raise RunStopped(
            f"{out} could not be written: {error.strerror or error}. Nothing is left of it. Make room there, or choose another --out.",
            BAD_CHECKPOINT_WRITE,
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part(progress: Progress, start: float, stop: float) -> Progress:
    return lambda share: progress(start + share * (stop - start))


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.01 * size:
        raise Refusal(
            f"The export takes {size / 2**20:,.1f} MiB and {folder} has {free / 2**20:,.1f} free. Make room there, or choose another --out."
        )


def _refuse_changed_tokenizer(folder: Path, tokenizer: ExportedTokenizer) -> None:
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"] != tokenizer.prompt:
        raise Refusal(
            "transformers' AutoTokenizer does not read the exported tokenizer as training did. Nothing was exported; prepare the data with "
            "another tokenizer.json."
        )


def _provenance(facts: CardFacts, run: Path, hashes: dict[str, str]) -> str:
    starts = run / STARTS
    begun = json.loads(starts.read_text(encoding="utf-8"))["starts"] if starts.is_file() else []
    record = {
        "format": FORMAT,
        "name": facts.recipe.run.name,
        "step": facts.step,
        "weights": facts.which,
        **{name: facts.record.get(name) for name in ("imported", "tokens", "flops", "evaluation")},
        "sequence_length": facts.sequence_length,
        "begin_token": {"token": facts.begin, "policy": "before every document"},
        "logit_difference": dict(facts.compared),
        "trained_by": {name: begun[-1].get(name) for name in ("commit", "python", "packages")} if begun else None,
        "recipe": facts.recipe.model_dump(mode="json"),
        "sha256": hashes,
    }
    return dump(record, indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class LoadedExport(LoadedModel):
    """Of an export."""

    solver_iterations: int | str
    """How far its configuration says to solve: "auto" or a number."""


def load_export(path: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LoadedExport:
    """The model of an export folder, without transformers and without the code in the folder; only safetensors are opened.

    Raises Refusal for a config.json that no export has, and for weights that are not whole or not this model's.
    """
    config = read_config(path / CONFIG)
    device = device or device_of("auto")
    model = load_weights(config.architecture, path, STEM, device, dtype or getattr(torch, config.dtype))
    return LoadedExport(
        path=path,
        model=model,
        device=device,
        which=f"{STEM}.safetensors",
        find_tokenizer=partial(_tokenizer_of, path),
        sequence_length=config.sequence_length,
        solver_iterations=config.solver_iterations,
    )


def _tokenizer_of(path: Path) -> Path:
    file = path / TOKENIZER
    if not file.is_file():
        raise Refusal(f"{path} has no {TOKENIZER}. Copy the export again, whole.")
    return file
