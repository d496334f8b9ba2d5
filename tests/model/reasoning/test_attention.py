"""Attention whose backward is written out: the gradients of fp64, once and twice, however many sequences are taken at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.reasoning import attention
from model.reasoning.attention import attend

SHAPE = (3, 2, 13, 8)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient, numbers that bf16 can hold, laid out as the blocks lay them out: heads within positions."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, length, size = SHAPE
    drawn = torch.randn(4, rows, length, heads, size, generator=generator).bfloat16()
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in drawn]


def gradients(dtype: torch.dtype) -> list[Tensor]:
    q, k, v, do = inputs(dtype)
    return list(torch.autograd.grad(attend(q, k, v), (q, k, v), do))


@pytest.mark.parametrize("scores", [1, 2 * 2 * 13 * 13, 1 << 20])
def test_gradients_are_those_of_fp64(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES", scores)
    for found, true in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - true).norm() < 5e-3 * true.norm()


def test_gradients_can_be_differentiated() -> None:
    def penalty(dtype: torch.dtype) -> Tensor:
        q, k, v, do = inputs(dtype)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            first = torch.autograd.grad(attend(q, k, v), q, do, create_graph=True)[0]
            return torch.autograd.grad(first.square().sum(), k)[0]

    true = penalty(torch.float64)
    assert (penalty(torch.bfloat16) - true).norm() < 2e-2 * true.norm()


def test_forward_is_torch_s_own() -> None:
    q, k, v, _ = inputs(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
