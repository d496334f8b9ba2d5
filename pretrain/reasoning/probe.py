"""The probe of a puzzle run: the loss of one supervision step of one fixed grid from fixed latents, without gradient.

A checkpoint keeps it; measured again after a resume, it tells whether all came back. The grid is repeated to a micro-batch, which has the
same loss whatever its size and takes no shapes of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from model.reasoning.supervision import empty_carry, supervise
from pretrain.engine import model_of
from pretrain.reasoning.config import PuzzleRecipe


@torch.no_grad()
def probe_loss(engine: Any, recipe: PuzzleRecipe, device: torch.device) -> float:
    """The same on all ranks, which all call it. Leaves the generators alone."""
    rows, generator = recipe.train.micro_batch, torch.Generator().manual_seed(0)
    shape = (2, 1, recipe.cells)
    inputs, answers = (
        torch.randint(recipe.model.vocabulary_size or 0, shape, generator=generator).to(device, torch.uint8).expand(-1, rows, -1)
    )
    start = model_of(engine).start(1, generator)  # type: ignore[operator]  # a Reasoner
    latents = tuple(latent.expand(rows, -1, -1).contiguous() for latent in start)
    carry = empty_carry(latents, recipe.cells)._replace(inputs=inputs, answers=answers)
    engine.eval()
    loss = supervise(engine, carry, recipe.supervision, torch.zeros(rows, dtype=torch.int32, device=device)).loss
    engine.train()
    return float(loss)
