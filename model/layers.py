"""The parts every block is made of, and `Layers`: the seam through which tensor parallelism is passed in.

A model never builds a matrix itself: it asks `Layers` for a column-parallel (output cut), a row-parallel (input cut), a
replicated matrix or an embedding, and for the cross-entropy against an unembedding. `PlainLayers` gives the ordinary ones;
a parallel layout gives sharded ones with the same whole-matrix meaning.

Shapes: b batch, s sequence, w width, v vocabulary.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BackboneConfig
from model.fused import relu2, rms_norm
from model.loss import cross_entropy_sum, cross_entropy_tokens


class Layers(Protocol):
    """What a parallel layout must provide. Matrices carry no bias; sizes are those of the whole matrix."""

    def column(self, inputs: int, outputs: int) -> nn.Module: ...
    def row(self, inputs: int, outputs: int) -> nn.Module: ...
    def replicated(self, inputs: int, outputs: int) -> nn.Module: ...
    def embedding(self, rows: int, width: int) -> nn.Module: ...
    def local_heads(self, heads: int) -> int:
        """Heads this rank computes."""
        ...

    def cross_entropy_sum(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats, differentiable; see model.loss."""
        ...

    def cross_entropy_tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every token, not differentiable; see model.loss."""
        ...


class PlainLayers:
    """One process holds every matrix whole."""

    def column(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    row = replicated = column

    def embedding(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows, width)

    def local_heads(self, heads: int) -> int:
        return heads

    cross_entropy_sum = staticmethod(cross_entropy_sum)
    cross_entropy_tokens = staticmethod(cross_entropy_tokens)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension, computed in x's precision and returned in the gain's.

    So an fp32 solver state enters a bf16 block through an fp32 norm, and is rounded once.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class ChannelGate(nn.Module):
    """x * gamma with gamma = maximum * sigmoid(raw), one raw number a channel; keeps a map contractive early on."""

    def __init__(self, width: int, initial: float, maximum: float) -> None:
        super().__init__()
        share = min(initial / maximum, 1 - 1e-6)
        self.raw = nn.Parameter(torch.full((width,), math.log(share / (1 - share))))
        self.maximum = maximum

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.maximum * torch.sigmoid(self.raw.to(torch.promote_types(self.raw.dtype, torch.float32)))).to(x.dtype)


class MLP(nn.Module):
    """relu2: W2 relu(W1 x)^2. swiglu: W2 (silu(Wg x) * W1 x). Gate and up stay separate matrices, so shards stay whole rows."""

    def __init__(self, config: BackboneConfig, layers: Layers) -> None:
        super().__init__()
        self.up = layers.column(config.width, config.hidden)
        self.gate = layers.column(config.width, config.hidden) if config.mlp == "swiglu" else None
        self.down = layers.row(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(relu2(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))
