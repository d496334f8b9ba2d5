"""The parts every block is made of, and `Layers`: the seam through which tensor parallelism is passed in.

A model never builds a matrix itself: it asks `Layers` for a column-parallel (output cut), a row-parallel (input cut), a
replicated matrix or an embedding, and for the cross-entropy against an unembedding. `PlainLayers` gives the ordinary ones;
a parallel layout gives sharded ones with the same whole-matrix meaning (pretrain/tensor_parallel.py).

Between a row-parallel matrix and the next column-parallel one, activations are "this rank's tokens": all of them, or, where a
layout divides tokens over ranks, [b, s / ranks, w]. Inside, they are all tokens of this rank's channels.

    this rank's tokens -- enter --> all tokens -- column --> this rank's channels -- row --> this rank's tokens

Shapes: b batch, s sequence, w width, v vocabulary.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BackboneConfig
from model.fixed_point import UNDIVIDED, Tokens
from model.fused import relu2, rms_norm
from model.loss import cross_entropy_sum, cross_entropy_tokens


class Layers(Protocol):
    """What a parallel layout must provide. Matrices carry no bias; sizes are those of the whole matrix."""

    tokens: Tokens
    """How tokens are divided outside matrices."""

    def column(self, inputs: int, outputs: int) -> nn.Module:
        """[b, s, inputs] -> this rank's channels of [b, s, outputs]."""
        ...

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """This rank's channels of [b, s, inputs] -> this rank's tokens of [b, s, outputs]."""
        ...

    def replicated(self, inputs: int, outputs: int) -> nn.Module:
        """A whole matrix on this rank's tokens."""
        ...

    def embedding(self, rows: int, width: int) -> nn.Module:
        """[b, s] -> this rank's tokens of [b, s, width]."""
        ...

    def value_embedding(self, rows: int, width: int) -> nn.Module:
        """[b, s] -> this rank's channels of [b, s, width]."""
        ...

    def local_heads(self, heads: int) -> int:
        """Heads this rank computes."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """This rank's tokens -> all tokens, on the way into column-parallel matrices (once for all that read x)."""
        ...

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds and applies to its own tokens; its gradient is the sum over the ranks."""
        ...

    def divided(self) -> Layers:
        """The same layout with tokens divided over the ranks outside matrices: what the solver's state lives in."""
        ...

    def divide(self, x: Tensor) -> Tensor:
        """Activations of this layout as those of `divided()`."""
        ...

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """The shape of the whole matrix of which `parameter` may be a shard."""
        ...

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """The part of a whole matrix that `parameter` holds."""
        ...

    def cross_entropy_sum(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats, differentiable; see model.loss."""
        ...

    def cross_entropy_tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every token, not differentiable; see model.loss."""
        ...


class PlainLayers:
    """One process holds every matrix whole, and every token."""

    tokens: Tokens = UNDIVIDED

    def column(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    row = replicated = column

    def embedding(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows, width)

    value_embedding = embedding

    def local_heads(self, heads: int) -> int:
        return heads

    def enter(self, x: Tensor) -> Tensor:
        return x

    shared = divide = enter

    def divided(self) -> Layers:
        return self

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:
        return whole

    cross_entropy_sum = staticmethod(cross_entropy_sum)
    cross_entropy_tokens = staticmethod(cross_entropy_tokens)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension, computed in x's precision and returned in the gain's.

    So an fp32 solver state enters a bf16 block through an fp32 norm, and is rounded once.
    """

    def __init__(self, width: int, eps: float, layers: Layers) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.shared = eps, layers.shared
        self.reset()

    def reset(self) -> None:
        """The first value of the gain."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).to(self.weight.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The same in x's own precision."""
        return rms_norm(x, self.shared(self.weight.to(x.dtype)), self.eps)


class ChannelGate(nn.Module):
    """x * gamma with gamma = maximum * sigmoid(raw), one raw number a channel; keeps a map contractive early on."""

    def __init__(self, width: int, initial: float, maximum: float, layers: Layers) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(width))
        self.initial, self.maximum, self.shared = initial, maximum, layers.shared
        self.reset()

    def reset(self) -> None:
        """The first value of the raw numbers."""
        share = min(self.initial / self.maximum, 1 - 1e-6)
        nn.init.constant_(self.raw, math.log(share / (1 - share)))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.shared(self.raw.to(torch.promote_types(self.raw.dtype, torch.float32)))
        return x * (self.maximum * torch.sigmoid(raw)).to(x.dtype)


class MLP(nn.Module):
    """relu2: W2 relu(W1 x)^2. swiglu: W2 (silu(Wg x) * W1 x). Gate and up stay separate matrices, so shards stay whole rows."""

    def __init__(self, config: BackboneConfig, layers: Layers) -> None:
        super().__init__()
        self.enter = layers.enter
        self.up = layers.column(config.width, config.hidden)
        self.gate = layers.column(config.width, config.hidden) if config.mlp == "swiglu" else None
        self.down = layers.row(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's tokens [b, s, w] -> the same."""
        x = self.enter(x)
        if self.gate is None:
            return self.down(relu2(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))
