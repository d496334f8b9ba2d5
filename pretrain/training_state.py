"""What a run must remember besides weights and optimizer, so that the next step is the one it would have been.

Shared by all ranks (state.json, written by rank 0): tokens, ledger, data position, counters, telemetry ids, a probe loss and the resolved
recipe. The schedule is a function of the tokens and needs no state. Of each rank: the states of its random generators
(random_rank_00000.json). Tensors that belong to a run are in the model's or the optimizer's own state, which DeepSpeed saves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.errors import Refusal

STATE = "state.json"
"""The file it is in."""

FREE_KEYS = (
    "run",
    "telemetry",
    "checkpoint",
    "evaluation",
    "train.log_every",
    "train.hang_timeout",
    "train.check_every",
    "train.peak_flops",
    "train.nonfinite_limit",
    "data.path",
    "data.workers",
    "data.cache",
)
"""Recipe keys (or whole sections) that may differ between a checkpoint and the run that resumes it: they do not change what is learnt.

Data may move: the loader's own state, which is among what is saved, knows its shards by their hashes and refuses others."""

LAYOUT_KEYS = ("layout", "train.micro_batch", "train.compile", "train.recompute")
"""How the work is divided, which may differ too: it changes what is learnt by rounding alone. train.global_batch is not of them."""

MODEL_KEYS = ("model", "attractor", "loop")
"""What the weights alone settle."""


@dataclass
class TrainingState:
    """Everything but weights, optimizer and random states, as plain JSON; the same on all ranks."""

    tokens: int
    config: dict[str, Any]
    ledger: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    probe_loss: float | None = None

    def to_json(self) -> str:
        """As text. Floats keep every bit; NaN and infinities are written as Python writes them."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainingState:
        """The inverse of `to_json`. What another version wrote besides is left out."""
        stored = json.loads(text)
        return cls(**{part.name: stored[part.name] for part in fields(cls)})

    @classmethod
    def read(cls, checkpoint: Path) -> TrainingState:
        """That of a checkpoint's folder. Raises Refusal for a file that is none."""
        try:
            return cls.from_json((checkpoint / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refusal(
                f"{checkpoint / STATE} is no state of a run ({type(error).__name__}: {error}). Take another checkpoint."
            ) from error


def changed_keys(stored: Mapping[str, Any], present: Mapping[str, Any], *, only: Sequence[str] | None = None) -> list[str]:
    """One phrase a key that differs and may not, as `optimizer.lr: 0.001 in the checkpoint, 0.002 now`; sorted by key.

    only: the keys or sections that may not; None: all but FREE_KEYS and LAYOUT_KEYS.
    """
    before, after = _binding(stored, only), _binding(present, only)
    return [
        f"{key}: {_show(before, key)} in the checkpoint, {_show(after, key)} now"
        for key in sorted(before.keys() | after.keys())
        if _show(before, key) != _show(after, key)
    ]


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _binding(config: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flatten(config, "").items()
        if (not _among(key, (*FREE_KEYS, *LAYOUT_KEYS)) if only is None else _among(key, only))
    }


def _among(key: str, keys: Sequence[str]) -> bool:
    return any(key == other or key.startswith(other + ".") for other in keys)


def _flatten(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def capture_random_states() -> str:
    """The states of this process's generators (python, numpy, torch on the CPU, torch on the present CUDA device) as JSON text."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return json.dumps(
        {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "torch": _hex(torch.get_rng_state()),
            "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        }
    )


def restore_random_states(text: str) -> None:
    """Sets every generator to what `capture_random_states` saw. A CUDA state is left out on a machine without CUDA."""
    states = json.loads(text)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_unhex(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(states["cuda"]))


def reseed(seed: int, step: int, rank: int) -> None:
    """Sets every generator anew, for a rank that has no state of its own to restore: the same for the same seed, step and rank."""
    for_python, for_numpy, for_torch = np.random.SeedSequence([seed, step, rank]).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
