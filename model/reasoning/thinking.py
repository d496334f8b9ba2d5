"""What a recurrence over latents is asked and what it answers: the seam between the reasoner and its kinds.

A kind (trm.py, hrm.py, transformer.py, attractor.py) is a module with a `latents` count that is called with the latents, the embedded
puzzle x and an `Asked`, and answers with `Thinking`. Embedding, heads and starts belong to the reasoner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.reasoning.blocks import Tables

Latents = tuple[Tensor, ...]
"""(y, z), each [b, L, w] in the model's precision; of a transformer one empty tensor [b, 0, w]."""


class Asked(NamedTuple):
    """What one forward pass has in common."""

    tables: Tables
    iterations: int | None
    """Of every inner loop or solve: None as configured."""
    noise: float
    """Standard deviation of the noise on the path of this pass: 0 without gradients."""

    def draw(self, like: Tensor) -> Tensor | None:
        """Noise for one update, from torch's default generator; None where there is none."""
        return self.noise * torch.randn_like(like) if self.noise else None


class Thinking(NamedTuple):
    """The outcome of a supervision step, before the heads."""

    answer: Tensor
    """y [b, L, w], differentiable where gradients are on."""
    latents: Latents
    evaluations: float
    """Applications of a network a sequence without gradient."""
    applications: float
    """And with."""
    record: dict[str, Tensor]
    """Scalars of the solver."""
    penalty: Tensor | None = None
