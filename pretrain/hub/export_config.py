"""config.json of an export: written from a model's configuration, and read back strictly.

    architectures, model_type "attractor", auto_map          how transformers finds modeling_attractor.py
    model, attractor, solver, loop                           our sections, every key, as in model/config.py
    solver_iterations ("auto" | n), solver_tolerance         how the model is to be used; the latter stands above solver.tolerance
    vocab_size, hidden_size, ...                             transformers' usual names for what the sections say

Refused on reading, in one paragraph that names file, key and value: keys that do not exist, values of another type or out of range, usual
fields that contradict the sections, and other kinds of model, a code-free export among them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from model.config import AttractorConfig, BackboneConfig, LoopConfig, ModelConfig, SolverConfig
from pretrain.errors import Refusal

CONFIG = "config.json"
MODEL_TYPE = "attractor"
SECTIONS: dict[str, type] = {"model": BackboneConfig, "attractor": AttractorConfig, "solver": SolverConfig, "loop": LoopConfig}
_ROUTES = {
    "AutoConfig": "modeling_attractor.AttractorConfig",
    "AutoModelForCausalLM": "modeling_attractor.AttractorForCausalLM",
}
_OTHER_KEYS = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "solver_iterations", "solver_tolerance"),
}


class ReadConfig(NamedTuple):
    """What a config.json says."""

    architecture: ModelConfig
    solver_iterations: int | str
    sequence_length: int
    dtype: str


def config_document(
    architecture: ModelConfig, *, solver_iterations: int | str, sequence_length: int, begin_id: int, dtype: str, version: str
) -> dict[str, Any]:
    """config.json of a model in its own architecture. dtype: torch's name of the precision to load it in; version: of transformers."""
    return {
        "architectures": ["AttractorForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": _ROUTES,
        **{name: asdict(getattr(architecture, name)) for name in SECTIONS},
        "solver_iterations": solver_iterations,
        "solver_tolerance": architecture.solver.tolerance,
        **usual_fields(architecture.model),
        **use_fields(sequence_length, begin_id, dtype, version),
    }


def use_fields(sequence_length: int, begin_id: int, dtype: str, version: str) -> dict[str, Any]:
    """What transformers must know of any export to use it: length in tokens, special ids, the weights' type, its own version."""
    return {
        "max_position_embeddings": sequence_length,
        "bos_token_id": begin_id,
        "eos_token_id": begin_id,
        "pad_token_id": begin_id,
        "use_cache": True,
        "dtype": dtype,
        "transformers_version": version,
    }


def usual_fields(m: BackboneConfig) -> dict[str, Any]:
    """What transformers calls the sizes of a model."""
    return {
        "vocab_size": m.vocabulary_size,
        "hidden_size": m.width,
        "num_hidden_layers": m.backbone_layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.key_value_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.hidden,
        "tie_word_embeddings": m.tied_embeddings,
    }


def read_config(path: Path) -> ReadConfig:
    """The config.json at `path`, checked. Raises Refusal."""
    document = read_json_object(path)
    if (found := document.get("model_type")) != MODEL_TYPE:
        raise Refusal(
            f"{path} describes a model of the type {found!r}. Here only exports of the type {MODEL_TYPE!r} are read; a code-free export "
            f"(--plain) is for transformers: load it there, or export the run again without --plain."
        )
    allowed = {*SECTIONS, *_OTHER_KEYS, *usual_fields(BackboneConfig())}
    if unknown := sorted(document.keys() - allowed):
        raise Refusal(f"{path} has {unknown[0]!r}, which no export has. Remove it, or export the run again.")
    architecture = _architecture(document, path)
    for name, value in usual_fields(architecture.model).items():
        if document.get(name, value) != value:
            raise Refusal(
                f"{path} contradicts itself: {name} is {document[name]}, and its section 'model' makes it {value}. Mend one of them."
            )
    depth, length = document.get("solver_iterations", "auto"), document.get("max_position_embeddings", 0)
    if depth != "auto" and not _count(depth):
        raise Refusal(f'{path} has solver_iterations={json.dumps(depth)}: it must be "auto" or a number from 0.')
    if not _count(length):
        raise Refusal(f"{path} has max_position_embeddings={json.dumps(length)}: it must be a number of tokens.")
    dtype = document.get("dtype") or document.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise Refusal(f"{path} has dtype={json.dumps(dtype)}: it must be float32, bfloat16 or float16.")
    return ReadConfig(architecture, depth, length, dtype)


def read_json_object(path: Path) -> dict[str, Any]:
    """The configuration in a JSON file: of an export, or of what is imported. Raises Refusal."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path} is not JSON ({error}): it is cut short or damaged. Copy it again from its source.") from error
    if not isinstance(document, dict):
        raise Refusal(f"{path} holds no configuration: it is not an object of options. Copy it again from its source.")
    return document


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _architecture(document: dict[str, Any], path: Path) -> ModelConfig:
    sections = {name: _section(name, kind, document.get(name), path) for name, kind in SECTIONS.items()}
    try:
        if (tolerance := document.get("solver_tolerance")) is not None:
            if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
                raise ValueError(f"solver_tolerance={json.dumps(tolerance)} is no number.")
            sections["solver"] = replace(sections["solver"], tolerance=float(tolerance))
        architecture = ModelConfig(**sections)
    except (ValueError, OverflowError) as error:
        raise Refusal(f"{path} describes no model: {error}") from error
    if architecture.model.vocabulary_size is None:
        raise Refusal(f"{path} has no model.vocabulary_size, which an export states. Copy the export again, whole.")
    return architecture


def _section(name: str, kind: type, body: Any, path: Path) -> Any:
    if not isinstance(body, dict):
        raise Refusal(f"{path} has no section {name!r}. Copy the export again, whole.")
    known = [field.name for field in fields(kind)]
    if unknown := sorted(body.keys() - set(known)):
        raise Refusal(f"{path} has {name}.{unknown[0]}, which does not exist; the section {name!r} has {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *(str(part) for part in first["loc"][:1])])
        said = first.get("ctx", {}).get("error") or f"{where}={json.dumps(first['input'])}: {first['msg']}."
        raise Refusal(f"{path} describes no model: {said}") from error
