"""Stable-max in fp32 against the published formula in fp64, value and gradient, where answers are wrong, right and nearly certain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.reasoning.loss import cross_entropy, stablemax_cross_entropy


def published(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(s_y / sum s) in fp64, as written in TRM's losses; exact in fp64 as far as 1e-15 / loss."""
    x = logits.double()
    scores = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    return -torch.log(scores / scores.sum(-1, keepdim=True)).gather(-1, targets.long()[..., None])[..., 0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 3e3])
@pytest.mark.parametrize("certain", [0.0, 1e4])
def test_stablemax_in_fp32_has_fp32s_error(scale: float, certain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = scale * torch.randn(64, 9, 11, generator=generator), torch.randint(0, 11, (64, 9), generator=generator)
    if certain:  # the answer's logit far up, the others' far down: a loss of about 1e-7
        logits = (-logits.abs() - certain).scatter(-1, targets[..., None], certain)
    logits.requires_grad_()
    got, want = stablemax_cross_entropy(logits, targets), published(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-15)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, want)]
    # of each number beside the largest of its cell: the published form cancels in those that are small
    error = (gradients[0] - gradients[1]).abs().amax(-1) / gradients[1].abs().amax(-1)
    assert float(error.max()) < 1e-5


def test_the_gradient_is_finite_and_one_sided_nowhere() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, -0.0, 2.0]], dtype=torch.float64, requires_grad=True)  # 1 - x is 0 at 1
    target = torch.tensor([0])
    (gradient,) = torch.autograd.grad(stablemax_cross_entropy(logits, target).sum(), logits)
    up, down = (stablemax_cross_entropy(logits.detach() + sign * 1e-6 * torch.eye(5), target.expand(5)) for sign in (1, -1))
    torch.testing.assert_close(gradient[0], (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


def test_softmax_is_torchs() -> None:
    logits, targets = torch.randn(3, 4, 5, dtype=torch.bfloat16), torch.randint(0, 5, (3, 4), dtype=torch.uint8)
    want = F.cross_entropy(logits.float().flatten(0, 1), targets.long().flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(cross_entropy("softmax", logits, targets), want)
    assert cross_entropy("stablemax", logits, targets).shape == (3, 4)
