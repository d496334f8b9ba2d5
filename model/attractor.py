"""The map f(y, y0) whose fixed point is the model's output, and nothing else.

    additive          f = y0 + D(y + y0)            published: Head(y + y0) - y with Head(h) = h + D(h); the same number
    concat            f = y0 + D(W [y; y0])         without its subtraction of large numbers
    init_only         f = y + D(y)                  y0 only starts the solver (*)
    cross_attention   f = y0 + D(y)                 keys and values of D's attention are read from y0

(*) y* then does not depend on y0 as far as the implicit function theorem can see, and the backbone would never train. The
ablation takes the residual path's gradient instead, df/dy0 = 1: what unrolling y_k = y0 + sum D(y_i) gives with D' left out.

D(h) is the sum of what the gated blocks add. y and y0 stay in the solver's precision (fp32 or more); each block rounds once,
at its norm, to the precision of its weights. Shapes: y, y0, f [b, s, w]. Source: arXiv 2605.12466 and its public code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Context
from model.block import Block
from model.config import AttractorConfig, BackboneConfig
from model.layers import Layers


class Increment(nn.Module):
    """D: gated blocks, and the sum of what they add."""

    def __init__(self, backbone: BackboneConfig, config: AttractorConfig, layers: Layers) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(backbone, layers, gates=config) for _ in range(config.layers))

    def increment(self, h: Tensor, memory: Tensor | None, context: Context) -> Tensor:
        """D(h); memory: what keys and values are read from, where that is not h."""
        first, *rest = self.blocks
        total = first(h, context, memory)
        for block in rest:
            total = total + block(h + total, context, memory)
        return total


class Attractor(Increment):
    def __init__(self, backbone: BackboneConfig, config: AttractorConfig, layers: Layers) -> None:
        super().__init__(backbone, config, layers)
        self.injection = config.injection
        self.merge = layers.replicated(2 * backbone.width, backbone.width) if config.injection == "concat" else None

    def forward(self, y: Tensor, y0: Tensor, context: Context) -> Tensor:
        if self.merge is not None:
            merged = self.merge(torch.cat((y, y0), dim=-1).to(self.merge.get_parameter("weight").dtype))
            return y0 + self.increment(merged.to(y.dtype), None, context)
        if self.injection == "additive":
            return y0 + self.increment(y + y0, None, context)
        if self.injection == "cross_attention":
            return y0 + self.increment(y, y0, context)
        return y + (y0 - y0.detach()) + self.increment(y, None, context)
