"""First values of a reasoner's parameters, as published.

    matrices            truncated normal, std 1 / sqrt(inputs)        (LeCun)
    tokens, positions   truncated normal, std 1 / sqrt(width); the embedding multiplies by sqrt(width)
    halting head        weight 0, bias -5: nothing halts until it has been learnt
    puzzle embedding    0

Truncated at two standard deviations of the normal that is cut, which is widened so that what is left has the standard deviation asked
for (as JAX does, and torch's trunc_normal_ does not). A parameter's numbers come from a generator of its own, seeded by (seed, name) on
the CPU: they depend neither on the order of construction nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.reasoning.reasoner import Reasoner

_CUT = 2.0


def truncated_normal(shape: Sequence[int], std: float, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """fp32 numbers of mean 0 and this standard deviation, none beyond 2.27 of it."""
    share = math.erf(_CUT / math.sqrt(2))  # of the normal inside the cut
    density = math.exp(-0.5 * _CUT**2) / math.sqrt(2 * math.pi)
    widened = std / math.sqrt(1 - 2 * _CUT * density / share)
    drawn = torch.empty(tuple(shape), dtype=torch.float32, device=device).uniform_(-share, share, generator=generator)
    return drawn.erfinv_().mul_(math.sqrt(2) * widened).clamp_(-_CUT * widened, _CUT * widened)


@torch.no_grad()
def initialise(model: Reasoner, seed: int) -> None:
    """Give every parameter its first value, in place."""
    model.halting.weight.zero_()
    model.halting.bias.fill_(-5)
    skipped = [model.halting.weight, model.halting.bias]
    if model.puzzle_embedding is not None:
        model.puzzle_embedding.weight.zero_()
        skipped.append(model.puzzle_embedding.weight)
    for name, parameter in model.named_parameters():
        if all(parameter is not other for other in skipped):  # [outputs, inputs], or [rows, width]: the last dimension is what is summed
            generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:4], "big"))
            parameter.copy_(truncated_normal(parameter.shape, parameter.shape[-1] ** -0.5, torch.device("cpu"), generator))
