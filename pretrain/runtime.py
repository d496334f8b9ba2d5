"""One process's surroundings: device, process group, and the quiet of libraries. Called before deepspeed is first imported.

DeepSpeed chooses its accelerator at import (DS_ACCELERATOR), compiles a shared-memory operator on CPUs unless told not to,
and logs at every turn; streaming and torch warn about things no user can mend. All of that is settled here, at its source.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import Refusal
from pretrain.sections import TrainSection


def device_of(wanted: str) -> torch.device:
    """The device of this process: `auto` takes this rank's GPU where there is one. Raises Refusal for cuda without CUDA."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Refusal("train.device=cuda, but torch sees no GPU here: run `attractor doctor`, or use train.device=cpu.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(settings: TrainSection) -> Iterator[torch.device]:
    """This rank's device, inside a process group (of one, if need be) that ends with the context.

    The rank is read from the environment, which pretrain.train completes. A collective waits train.hang_timeout at most.
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
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timedelta(seconds=settings.hang_timeout), verbose=False)
    try:
        yield device
    finally:
        dist.destroy_process_group()  # without it some ZeRO-3 runs die at exit


def settle_libraries(device: torch.device) -> None:
    """Tells DeepSpeed its accelerator and quiets what libraries say; before anything imports deepspeed."""
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("streaming").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|streaming|torch\.distributed|torch\.nn\.modules\.module|torch\.cuda).*")
