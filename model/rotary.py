"""Rotary position embedding (Su et al. 2021), the half-split pairing that the Hugging Face models use.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin],  angle = position * base^(-2i / head_dim)

Tables are fp32 whatever the model computes in, made once a length and device; they are no buffers, because an engine that
converts a module to bf16 would round them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from model.fused import rotate_halves


@lru_cache(maxsize=16)
def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [length, head_dim / 2] in fp32."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, heads, head_dim] turned by its position; the result has x's dtype."""
    return rotate_halves(x, cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype))
