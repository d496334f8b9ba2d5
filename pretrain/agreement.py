"""Questions that all ranks must answer alike, or some of them wait for ever in a collective that the others never enter.

Without a process group, or with one rank, nothing is sent.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on at least one rank, the same answer on all: an all-reduce of one byte. Every rank must ask."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    raised = torch.tensor([flag], dtype=torch.uint8, device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gather(value: T) -> list[T]:
    """The small picklable `value` of every rank, by rank, on all of them. Every rank must ask."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
