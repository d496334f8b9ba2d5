"""Direct prediction: the embedded puzzle through the blocks once, no latents, no recurrence. What the reasoners are compared with.

The published code's baseline carries its output from one supervision step to the next and adds it to the puzzle, which makes it a
recurrence of depth 16; the published figures (HRM, arXiv 2506.21734: "direct prediction") are of one pass, and so is this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.reasoning.blocks import Network
from model.reasoning.config import ReasoningConfig
from model.reasoning.thinking import Asked, Latents, Thinking


class Transformer(nn.Module):
    latents = 0

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__()
        self.network = Network(config.model)

    def forward(self, latents: Latents, x: Tensor, asked: Asked) -> Thinking:
        y = self.network(x, x.new_zeros(()), asked.tables)
        differentiated = torch.is_grad_enabled()
        return Thinking(y, latents, float(not differentiated), float(differentiated), {})
