"""One process's surroundings: device, process group, and the quiet of libraries. Called before deepspeed is first imported.

DeepSpeed chooses its accelerator at import (DS_ACCELERATOR), compiles a shared-memory operator on CPUs unless told not to,
and logs at every turn; streaming and torch warn about things no user can mend. All of that is settled here, at its source.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import Refusal
from pretrain.rendezvous import meet
from pretrain.sections import SharedTrainSection

_COLLECTIVES_WAIT = 2.0
"""Times train.hang_timeout."""


def device_of(wanted: str) -> torch.device:
    """The device of this process: `auto` takes this rank's GPU where there is one. Raises Refusal for cuda without CUDA."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Refusal("train.device=cuda, but torch sees no GPU here: run `attractor doctor`, or use train.device=cpu.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(settings: SharedTrainSection) -> Iterator[torch.device]:
    """This rank's device, inside a process group (of one, if need be) that ends with the context.

    The rank is read from the environment, which pretrain.train completes. Ranks wait train.hang_timeout for each other at the start. A
    collective of all ranks waits twice as long, so that the watchdog, which shows where each rank stands, speaks first; the groups that
    DeepSpeed and megatron make keep torch's own bound (gloo 30 minutes, NCCL 10). Raises Refusal when the ranks do not find each other.
    """
    device = device_of(settings.device)
    settle_libraries(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 30 s to build, and 69 MB a rank left in /dev/shm
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        _join(backend, device, settings.hang_timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)  # adopts the group
    try:
        yield device
    finally:
        dist.destroy_process_group()  # without it some ZeRO-3 runs die at exit


def _join(backend: str, device: torch.device, seconds: float) -> None:
    """The process group of all ranks. Raises Refusal when they do not meet, or meet and cannot connect to each other."""
    store, rank, ranks = meet(device.type, seconds)
    bound = device if device.type == "cuda" and ranks > 1 else None  # as DeepSpeed does: connects now, not at the first collective
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=_COLLECTIVES_WAIT * seconds), device_id=bound
        )
    except RuntimeError as error:
        raise Refusal(
            f"rank {rank} on {socket.gethostname()} met the others but could not connect to each of them by {backend} "
            f"({str(error).partition(chr(10))[0]}). If a node has several networks, name the interface between the nodes in "
            f"{backend.upper()}_SOCKET_IFNAME on every node (`ip -br addr` lists them; a line in .deepspeed_env reaches all nodes)."
        ) from error


def settle_libraries(device: torch.device) -> None:
    """Tells DeepSpeed its accelerator and quiets what libraries say; before anything imports deepspeed."""
    os.environ["DS_ACCELERATOR"] = device.type
    for name in ("streaming", "torch.utils.cpp_extension"):  # the second says at every import that it found no CUDA
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|streaming|megatron|torch\.distributed|torch\.nn\.modules\.module|torch\.cuda).*")
