"""The Tiny Recursive Model: one network for both latents (arXiv 2510.04871).

    outer_cycles times:   inner_cycles times: z <- net(z, y + x);   then y <- net(y, z)

All cycles but the last run without gradient; the last is differentiated through all its inner_cycles + 1 applications. y and z enter it
as they are: nothing of an earlier cycle, nor of an earlier supervision step, is differentiated.

The equilibrium variant (EqR, arXiv 2605.21488) takes partial steps and adds fresh noise to every update. Its code adds noise in
evaluation too; here noise belongs to training, as the paper argues for it, so that an evaluation is a function of the puzzle and the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.reasoning.blocks import Network
from model.reasoning.config import ReasoningConfig
from model.reasoning.thinking import Asked, Latents, Thinking


class TRM(nn.Module):
    latents = 2

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__()
        self.network = Network(config.model)
        self.outer, self.inner = config.model.outer_cycles, config.model.inner_cycles

    def forward(self, latents: Latents, x: Tensor, asked: Asked) -> Thinking:
        y, z = latents
        inner = self.inner if asked.iterations is None else asked.iterations
        with torch.no_grad():
            for _ in range(self.outer - 1):
                y, z = self._cycle(y, z, x, inner, asked)
        y, z = self._cycle(y, z, x, inner, asked)
        last = float(inner + 1)
        if not torch.is_grad_enabled():
            return Thinking(y, (y, z), self.outer * last, 0.0, {})
        return Thinking(y, (y, z), (self.outer - 1) * last, last, {})

    def _cycle(self, y: Tensor, z: Tensor, x: Tensor, inner: int, asked: Asked) -> tuple[Tensor, Tensor]:
        injection = y + x
        for _ in range(inner):
            z = self.network(z, injection, asked.tables, asked.draw(z))
        return self.network(y, z, asked.tables, asked.draw(y)), z
