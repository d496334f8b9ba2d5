"""The Hierarchical Reasoning Model: two networks at two time scales, with a one-step gradient (arXiv 2506.21734).

    outer_cycles times:   inner_cycles times: z <- low(z, y + x);   then y <- high(y, z)

Only the last application of each network is differentiated; all before it run without gradient. HRM halts by Q-learning, which takes a
further forward pass: see supervision.py. Published: 2 cycles of 2, 4 blocks in each network, a prefix of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.reasoning.blocks import Network
from model.reasoning.config import ReasoningConfig
from model.reasoning.thinking import Asked, Latents, Thinking


class HRM(nn.Module):
    latents = 2

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__()
        self.low, self.high = Network(config.model), Network(config.model)
        self.outer, self.inner = config.model.outer_cycles, config.model.inner_cycles

    def forward(self, latents: Latents, x: Tensor, asked: Asked) -> Thinking:
        y, z = latents
        inner = self.inner if asked.iterations is None else asked.iterations
        with torch.no_grad():
            for cycle in range(1, self.outer + 1):
                last = cycle == self.outer
                injection = y + x
                for _ in range(inner - 1 if last else inner):
                    z = self.low(z, injection, asked.tables)
                if not last:
                    y = self.high(y, z, asked.tables)
        if inner:
            z = self.low(z, y + x, asked.tables)
        y = self.high(y, z, asked.tables)
        total = float(self.outer * (inner + 1))
        differentiated = 2.0 if torch.is_grad_enabled() else 0.0
        return Thinking(y, (y, z), total - differentiated, differentiated, {})
