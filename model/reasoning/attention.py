"""Attention of every position to all others: torch's fused kernel, and in bf16 on a CPU a backward that is written out.

    S = q k^T / sqrt(d),  P = softmax(S),  o = P v
    dv = P^T do,  dP = do v^T,  dS = P (dP - rowsum(P dP)),  dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)

There torch's own backward (2.15) is several times as slow as the products it consists of, which was a quarter of a training step
(docs/performance.md). Here S and dP are computed in fp32, since an exponential and a difference would magnify their rounding, and the other
products in bf16; a few sequences at a time, so that memory grows with the square of the length for those alone.

Can be differentiated twice, which the Jacobian penalty needs, and is traced by torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SCORES = 1 << 20  # numbers in the scores of the sequences that backward takes at a time


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        rows = max(1, _SCORES // (q.shape[1] * q.shape[2] ** 2))
        pieces = zip(*(tensor.split(rows) for tensor in (q, k, v, grads[0])), strict=True)
        dq, dk, dv = zip(*(_gradients(*piece) for piece in pieces), strict=True)
        return torch.cat(dq), torch.cat(dk), torch.cat(dv)


def _gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()  # products of other strides take up to thrice as long
    scale = q.shape[-1] ** -0.5
    p = ((q.float() * scale) @ k.float().mT).softmax(dim=-1)
    ds = torch.ops.aten._softmax_backward_data(do.float() @ v.float().mT, p, -1, p.dtype).to(q.dtype)
    return (ds @ k) * scale, (ds.mT @ q) * scale, p.to(q.dtype).mT @ do


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each [b, heads, L, d]."""
    if torch.is_grad_enabled() and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _Attention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
