"""The exponential moving average of the weights: e <- decay e + (1 - decay) p after every step, from the initial weights.

`MuonAdamW(ema=decay)` keeps e in fp32 in its own state, beside the momentum, and updates it inside its step. So it has
the shape of this rank's partition (ZeRO divides its memory), a skipped step leaves it alone, and DeepSpeed's checkpoints
save and restore it with the rest of the optimizer's state. Copies of one weight on several ranks (replicated over tensor ranks, or
tied between stages) are stepped alike, so their averages stay alike. Off by default. TRM's protocol uses decay .999.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pretrain.zero import client_optimizer, masters, publish

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@torch.no_grad()
def _swap(engine: DeepSpeedEngine) -> None:
    """Exchanges weights and averages in place, on every rank, and shows the module the new weights."""
    state = client_optimizer(engine).state
    for master in masters(engine):
        average = state[master].get("ema")
        if average is not None:
            weights = master.detach().clone()
            master.copy_(average)
            average.copy_(weights)
    publish(engine)


@contextmanager
def averaged_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within it the module computes with the averaged weights. Collective; no optimizer step may happen inside.

    An error inside ends the run: the weights are then left as they are, since a rank that fails alone (a damaged shard) must not enter
    the collectives of an exchange that the others do not enter.

    Raises ValueError when the run keeps no average. Before the first step the average is the weights themselves.
    """
    if client_optimizer(engine).ema is None:
        raise ValueError("This run keeps no average of its weights: set optimizer.ema, for instance to 0.999.")
    _swap(engine)
    yield
    _swap(engine)
