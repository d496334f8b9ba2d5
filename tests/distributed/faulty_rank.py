"""One rank of `pretrain/train.py`, with a fault in rank 1: `python -m tests.distributed.faulty_rank hang|flip RECIPE key=value ...`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

import pretrain.step
from pretrain.train import main

FAULT_AT = 5


def faulty(kind: str) -> None:
    """From step FAULT_AT on, rank 1 sleeps, or has one bit of one weight that no other rank has."""
    original = pretrain.step.train_step

    def train_step(engine: Any, *arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == "1" and engine.global_steps + 1 == FAULT_AT:
            if kind == "hang":
                time.sleep(600)
            with torch.no_grad():
                engine.module.norm.weight.view(torch.int32)[3] ^= 1
        return original(engine, *arguments, **options)

    pretrain.step.train_step = train_step


if __name__ == "__main__":
    faulty(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
