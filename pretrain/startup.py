"""What all ranks must have alike before a run touches anything: code, versions of what computes, recipe, kind of device.

Nodes with another checkout, another torch or another override train on for hours and give a model that nobody meant, or stop in a
collective that names no cause. So each rank tells what it has, all compare with rank 0, and any difference is refused by
name: which files, which package, which keys with both values, on which ranks and hosts.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import yaml

from pretrain.agreement import gather
from pretrain.errors import Refusal, name_ranks

_ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("data_pipeline", "model", "pretrain")
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
_NAMED = 5
"""Files or keys spelt out."""
_ABSENT = "absent"
_REMEDIES = {
    "code": "Put the same checkout of attractor on every node.",
    "versions": "Install the same versions on every node (pip install -e . -c constraints.txt).",
    "recipe": "Give every node the same recipe file and the same overrides.",
    "device": "Use machines of one kind, or set train.device.",
}


class Start(NamedTuple):
    """What one rank starts with. Each part is a mapping from names to plain words, so that they compare and print alike."""

    host: str
    parts: dict[str, dict[str, str]]


def agree_on_start(recipe_yaml: str) -> None:
    """Compares this rank's start with all ranks'; `recipe_yaml` is the resolved recipe. All ranks call it, in a process group.

    Raises Refusal, the same on every rank, when any differs from rank 0.
    """
    parts = {"code": code(), "versions": versions(), "recipe": keys(recipe_yaml), "device": {"device": device()}}
    if faults := differences(gather(Start(socket.gethostname(), parts))):
        told = "; ".join(faults.values())
        remedies = " ".join(_REMEDIES[part] for part in faults)
        raise Refusal(f"The ranks of this run were not started alike: {told}. Nothing was touched. {remedies}")


def differences(starts: Sequence[Start]) -> dict[str, str]:
    """By part, a phrase on how ranks differ in it from rank 0; parts that all have alike are left out. `starts` is by rank."""
    hosts = [start.host for start in starts]
    faults = {}
    for part, own in starts[0].parts.items():
        parties: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for rank, start in enumerate(starts):
            if names := _differing(own, start.parts[part]):
                parties[tuple(_phrase(part, name, own, start.parts[part]) for name in names)].append(rank)
        if parties:
            faults[part] = "; ".join(f"{_listed(part, told)} on {name_ranks(ranks, hosts)}" for told, ranks in parties.items())
    return faults


def code() -> dict[str, str]:
    """A hash of every Python file of the packages that a run executes, by path from their common folder."""
    files = sorted(file for room in _ROOMS for file in (_ROOT / room).rglob("*.py"))
    return {str(file.relative_to(_ROOT)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers or files depend on their version."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def keys(recipe_yaml: str) -> dict[str, str]:
    """The recipe's values by dotted key (its regime by one of its own). How the text is laid out makes no difference."""
    found: dict[str, str] = {}
    for section, settings in yaml.safe_load(recipe_yaml).items():
        values = {f".{key}": value for key, value in settings.items()} if isinstance(settings, dict) else {"": settings}
        found |= {f"{section}{key}": str(value) for key, value in values.items()}
    return found


def device() -> str:
    """What this rank computes on: `cpu`, or `cuda` with the compute capability, which decides the kernels."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability())
    return "cpu"


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def _phrase(part: str, name: str, first: Mapping[str, str], second: Mapping[str, str]) -> str:
    if part == "code":
        return name
    return f"{name} is {second.get(name, _ABSENT)} (rank 0: {first.get(name, _ABSENT)})"


def _listed(part: str, told: Sequence[str]) -> str:
    more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    listed = ", ".join(told[:_NAMED]) + more
    return f"other code than rank 0's in {listed}" if part == "code" else listed
