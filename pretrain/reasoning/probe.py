"""The probe of a puzzle run: the loss of one supervision step of one fixed grid from fixed latents, without gradient.

A checkpoint keeps it; measured again after a resume, it tells whether all came back. The grid is repeated to a micro-batch, which has the
same loss whatever its size and takes no shapes of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.reasoning.supervision import empty_carry, supervise
from pretrain.engine import model_of
from pretrain.errors import Refusal
from pretrain.reasoning.config import PuzzleRecipe

if TYPE_CHECKING:
    from pretrain.checkpoint import Resumed


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


def refuse_other_probe(engine: Any, recipe: PuzzleRecipe, device: torch.device, resumed: Resumed, folder: Path) -> None:
    """Raises Refusal where the probe is another than that in the checkpoint that was resumed from `folder`; one without is let pass."""
    kept = resumed.state.probe_loss
    if kept is None:
        return
    found = probe_loss(engine, recipe, device)
    bound = 1e-2 if resumed.moved and recipe.train.precision == "bf16" else 1e-3  # bf16 rounds elsewhere on another layout
    if not abs(found - kept) <= bound * abs(kept):  # NaN is no agreement
        raise Refusal(
            f"The checkpoint of step {resumed.step} in {folder} does not come back as it was saved: its probe loss was {kept:.6f} and is "
            f"{found:.6f} now. Another version of a package may read it otherwise: compare the versions in run.json."
        )
