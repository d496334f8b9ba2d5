"""The average itself, in plain torch; swapping it in under ZeRO is in tests/distributed/test_muon_zero.py."""

from __future__ import annotations

import torch
from torch import nn

from model.roles import Role
from pretrain.optimizer import build_optimizer
from pretrain.sections import OptimizerSection


def test_average_follows_every_step_from_the_initial_weights() -> None:
    model = nn.Linear(3, 4)
    roles = {"weight": Role.BACKBONE_MATRIX, "bias": Role.BACKBONE_VECTOR}
    optimizer = build_optimizer(model, roles, OptimizerSection(name="muon", ema=0.75))
    expected = {p: p.detach().clone() for p in model.parameters()}
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, average in expected.items():
            average.mul_(0.75).add_(p.detach(), alpha=0.25)
    for p, average in expected.items():
        torch.testing.assert_close(optimizer.state[p]["ema"], average)
        assert not torch.allclose(average, p)


def test_off_by_default_it_costs_nothing() -> None:
    model = nn.Linear(3, 4)
    optimizer = build_optimizer(model, {"weight": Role.BACKBONE_MATRIX, "bias": Role.BACKBONE_VECTOR}, OptimizerSection())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all("ema" not in state for state in optimizer.state.values())
