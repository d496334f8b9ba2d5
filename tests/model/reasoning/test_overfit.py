"""Every model learns eight 4 x 4 Sudokus by heart under deep supervision: all grids exactly right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.reasoning.reasoner import Reasoner, build
from model.reasoning.supervision import explore, refill, supervise
from tests.model.reasoning.support import KINDS, begun, of_kind, sudokus

PUZZLES, MOST_STEPS, RATE = 8, 600, 3e-3


@torch.no_grad()
def exact(model: Reasoner, inputs: Tensor, answers: Tensor, steps: int) -> float:
    """Share of grids right after so many supervision steps from the start."""
    latents = model.start(len(inputs), torch.Generator().manual_seed(7))
    for _ in range(steps):
        thought = model(latents, inputs, torch.zeros(len(inputs), dtype=torch.int64))
        latents = thought.latents
    return float((thought.logits.argmax(-1) == answers).all(-1).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_eight_puzzles_are_learnt_by_heart(kind: str) -> None:
    steps = 1 if kind == "transformer" else 2
    # all rows explore, so that many are trained at the last step, where they are judged
    supervision, solver = {"steps": steps, "exploration": 1.0}, {"min_iterations": 2, "max_iterations": 2}
    config = of_kind(kind, outer_cycles=2, supervision=supervision, solver=solver)
    torch.manual_seed(0)
    model, (inputs, answers) = build(config), sudokus(PUZZLES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    carry, met, share = begun(model, inputs, answers), PUZZLES, 0.0
    for step in range(1, MOST_STEPS + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 20, max(0.1, 1.1 - step / 400))
        done = supervise(model, carry, config.supervision, explore(torch.rand(2, PUZZLES), config.supervision))
        optimizer.zero_grad()
        done.loss.backward()
        optimizer.step()
        rows = torch.arange(met, met + PUZZLES) % PUZZLES
        met += int(done.record["finished"])
        carry = refill(done.carry, inputs[rows], answers[rows], torch.zeros(PUZZLES, dtype=torch.int64), model.start(PUZZLES))
        if step % 25 == 0:
            share = exact(model, inputs, answers, steps)
            if share == 1:
                break
    assert share == 1, f"{share:.0%} of {PUZZLES} grids after {step} steps"
