"""Cross-entropy of tokens from logits, by stable-max or by softmax.

    stablemax   p_i = s(x_i) / sum_j s(x_j),   s(x) = x + 1 for x >= 0,  1 / (1 - x) below      (Prieto et al. 2025)
    softmax     s(x) = exp(x)

Stable-max grows linearly, so a right answer's loss never underflows to 0 and its gradient with it. The published code computes
log(s_y / sum s) in fp64, because the two are nearly equal where the answer is right. Here the loss is log1p(sum_{j != y} s_j / s_y),
in which nothing cancels: in fp32 it has fp32's relative error (a test holds it to 1e-6 of fp64, also where the loss is 1e-7), and no fp64
is needed, which accelerators are slow at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def stablemax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [..., v], targets [...] integers -> loss [...] in nats, at least fp32."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = torch.where(x < 0, 1 / (1 - x.clamp_max(0)), 1 + x)  # clamped: the branch not taken must stay finite
    index = targets.long()[..., None]
    rest = scores.scatter(-1, index, 0.0).sum(dim=-1)
    return torch.log1p(rest / scores.gather(-1, index)[..., 0])


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same with softmax."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(x.flatten(0, -2), targets.long().flatten(), reduction="none").view(targets.shape)


def cross_entropy(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """By the name in section `supervision`."""
    return (stablemax_cross_entropy if kind == "stablemax" else softmax_cross_entropy)(logits, targets)
