"""Three elementwise operations whose backward is written out, because torch has no fused kernel for them on every device.

    rms_norm    y = x r g,  r = (mean(x^2) + eps)^-1/2;    dx = r (g dy - xhat mean(g dy xhat)),  dg = sum dy xhat,  xhat = x r
    rotate      [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin];    backward is the rotation by the opposite angle
    relu2       y = relu(x)^2;    dx = 2 relu(x) dy

Composed from torch's operations they pass over memory about three times as often as they must: with them a step of width 256
on two CPU cores is an eighth faster (docs/performance.md). Each can be differentiated twice, which the Jacobian penalty needs,
and each is traced by torch.compile, which fuses them further. Where no gradient is asked for, the same arithmetic runs without the
machinery around it, which in generation costs more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        y, scale = _normed(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dy,) = grads
        x, gain, scale = ctx.saved_tensors
        again = torch.is_grad_enabled()  # to be differentiated again: the scale depends on x, and nothing may change in place
        if again:
            scale = _scale(x, ctx.eps)
        normed = x * scale
        product = dy * normed
        scaled = dy * gain if gain is not None else dy
        mean = (product @ gain)[..., None] / x.shape[-1] if gain is not None else product.mean(dim=-1, keepdim=True)
        dx = torch.addcmul(scaled, normed, mean, value=-1)
        dx = dx * scale if again else dx.mul_(scale)
        return dx, None if gain is None else product.flatten(0, -2).sum(0), None


def _normed(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    scale = _size(x).square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
    y = x * scale
    return (y if gain is None else y.mul_(gain)), scale


def _scale(x: Tensor, eps: float) -> Tensor:
    """The same scale, differentiable."""
    return (_size(x).square() / x.shape[-1] + eps).rsqrt().to(x.dtype)


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x [..., w] over its root mean square, times gain [w] if there is one; all of one dtype."""
    return _RMSNorm.apply(x, gain, eps) if torch.is_grad_enabled() else _normed(x, gain, eps)[0]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    y = x * torch.cat((cos, cos), dim=-1)
    y[..., :half].addcmul_(x[..., half:], sin, value=-1)
    y[..., half:].addcmul_(x[..., :half], sin)
    return y


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., 2 n] with its halves turned into each other by angles whose cos and sin [..., n] broadcast; all of one dtype."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _squared(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(x.new_zeros(()), x.clamp_min(0), grads[0], value=2)  # the factor at no further pass


def _squared(x: Tensor) -> Tensor:
    return x.clamp_min(0).mul_(x)


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _ReluSquared.apply(x) if torch.is_grad_enabled() else _squared(x)
