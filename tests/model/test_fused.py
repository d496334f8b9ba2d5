"""The written-out backwards against finite differences in float64, once and twice, and the forwards against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from model.fused import relu2, rms_norm, rotate_halves


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_rms_norm(check) -> None:  # type: ignore[no-untyped-def]
    x, gain = draw(3, 4, 6), draw(6)
    assert torch.allclose(rms_norm(x, gain, 1e-5), F.rms_norm(x, (6,), gain, 1e-5), rtol=1e-12)
    assert torch.allclose(rms_norm(x, None, 1e-5), F.rms_norm(x, (6,), None, 1e-5), rtol=1e-12)
    assert check(lambda a, g: rms_norm(a, g, 1e-2), (x, gain))
    assert check(lambda a: rms_norm(a, None, 1e-2), (x,))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_rotate_halves(check) -> None:  # type: ignore[no-untyped-def]
    x, angles = draw(2, 5, 3, 8), draw(5, 1, 4).detach()
    cos, sin = angles.cos(), angles.sin()
    plain = torch.cat((x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin), dim=-1)
    assert torch.allclose(rotate_halves(x, cos, sin), plain, rtol=1e-12)
    assert check(lambda a: rotate_halves(a, cos, sin), (x,))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_relu2(check) -> None:  # type: ignore[no-untyped-def]
    x = draw(4, 9)
    assert torch.equal(relu2(x), x.clamp_min(0).square())
    assert check(relu2, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_alone_and_dtypes_kept(dtype: torch.dtype) -> None:
    x, gain = draw(4, 8).to(dtype), draw(8).to(dtype)
    before = x.clone()
    for y in (rms_norm(x, gain, 1e-5), rotate_halves(x, gain[:4], gain[4:]), relu2(x)):
        assert y.dtype == dtype
        assert torch.equal(x, before)
