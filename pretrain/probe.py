"""The probe: the loss of fixed tokens after one evaluation of f. A checkpoint keeps it; measured again, it tells whether all came back.

The tokens are one sequence, repeated to a micro-batch: a micro-batch of any size has the same loss, and a pipeline the shapes it knows.
Before checkpoints moved between layouts they were as many sequences as a micro-batch has; what was saved then is compared with that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline import Batch
from pretrain.agreement import gather
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.evaluate import forward
from pretrain.mesh import Mesh

if TYPE_CHECKING:
    from pretrain.checkpoint import Resumed


@torch.no_grad()
def probe_loss(engine: Any, recipe: Recipe, device: torch.device, mesh: Mesh, *, sequences: int = 1) -> float:
    """The same on all ranks, which all call it. sequences: how many different ones, a divisor of the micro-batch."""
    length, rows = recipe.data.sequence_length or 0, recipe.train.micro_batch
    drawn = torch.randint(recipe.model.vocabulary_size or 0, (sequences, length + 1), generator=torch.Generator().manual_seed(0))
    tokens = drawn.repeat(rows // sequences, 1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:], dtype=torch.int32), torch.arange(rows))
    engine.eval()
    mask = recipe.data.mask_documents  # as in training: what travels through a pipeline must keep its shapes
    found = [float(loss) for loss, _, _ in forward(engine, [batch], (1,), device, mesh, mask_documents=mask)]
    engine.train()
    return next(losses[0] for losses in gather(found) if losses)


def refuse_other_probe(engine: Any, recipe: Recipe, device: torch.device, mesh: Mesh, resumed: Resumed, folder: Path) -> None:
    """Raises Refusal where the probe is another than that in the checkpoint that was resumed from `folder`; one without is let pass."""
    probes = [partial(probe_loss, engine, recipe, device, mesh, sequences=count) for count in (1, recipe.train.micro_batch)]
    refuse_unlike(probes, resumed, folder, recipe.train.precision)


def refuse_unlike(probes: Sequence[Callable[[], float]], resumed: Resumed, folder: Path, precision: str) -> None:
    """Raises Refusal unless one of the probes, measured in turn, gives the loss that the checkpoint keeps; one without is let pass."""
    kept = resumed.state.probe_loss
    if kept is None:
        return
    bound = 1e-2 if resumed.moved and precision == "bf16" else 1e-3  # bf16 rounds elsewhere on another layout
    found = []
    for probe in probes:
        found.append(probe())
        if abs(found[-1] - kept) <= bound * abs(kept):  # NaN is no agreement
            return
    raise Refusal(
        f"The checkpoint of step {resumed.step} in {folder} does not come back as it was saved: its probe loss was {kept:.6f} and is "
        f"{found[0]:.6f} now. Another version of a package may read it otherwise: compare the versions in run.json."
    )
