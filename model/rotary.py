"""Rotary position embedding (Su et al. 2021), the half-split pairing that the Hugging Face models use.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin],  angle = position * base^(-2i / head_dim)

Angles are computed in float64 and kept in fp32, once a length and device; they are rounded to the model's precision only where
they are used. They are no buffers: a table a module owns would be saved, moved and converted with it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from model.fused import rotate_halves


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [length, head_dim / 2] in fp32."""
    if detect_fake_mode() is not None:  # traced for shapes: a fake table must not be kept
        return _tables.__wrapped__(length, head_dim, base, device)
    return _tables(length, head_dim, base, device)


@lru_cache(maxsize=16)
def _tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, heads, head_dim] turned by its position, cos and sin [s, head_dim / 2] or [b, s, head_dim / 2]; the result has x's dtype."""
    return rotate_halves(x, cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype))
