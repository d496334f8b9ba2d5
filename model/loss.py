"""Next-token cross-entropy against an unembedding, without ever holding the logits of all tokens.

    loss_i = logsumexp(W h_i) - (W h_i)[target_i]            summed over the tokens whose target is not IGNORE

Tokens go through in chunks. The differentiable form computes d loss / d h and d loss / d W in the same pass (softmax minus
one-hot, a chunk at a time), so that nothing is recomputed and backward only multiplies by the incoming scalar: three matrix
products altogether, the least there are. Logits are exponentiated in fp32 whatever the weights' precision.

Shapes: hidden [n, w], weight [v, w], targets [n]; n tokens, w width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
_LOGITS_AT_ONCE = 1 << 25  # elements: 128 MiB in fp32, large enough to keep a GPU's matrix units full


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, min(tokens, _LOGITS_AT_ONCE // vocabulary))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits of at least fp32, the targets' logits, targets with IGNORE replaced by 0, 1 where a target counts)."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    safe = targets.clamp_min(0)
    return logits, logits.gather(-1, safe[:, None]).squeeze(-1), safe, (targets != IGNORE).to(logits.dtype)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits, at_target, safe, counts = _logits(hidden[part], weight, targets[part])
            highest = logits.amax(dim=-1)
            softmax = logits.sub_(highest[:, None]).exp_()  # in the logits' own memory: not yet divided by its sum
            sums = softmax.sum(dim=-1)
            total += ((sums.log() + highest - at_target) * counts).sum()
            softmax *= (counts / sums)[:, None]
            delta = softmax.scatter_add_(-1, safe[:, None], -counts[:, None]).to(hidden.dtype)
            torch.mm(delta, weight, out=grad_hidden[part])
            piece = (delta.T @ hidden[part]).to(accumulate)
            grad_weight = piece if grad_weight is None else grad_weight.add_(piece)
        assert grad_weight is not None
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of next-token losses in nats, a scalar of at least fp32; tokens whose target is IGNORE count nothing."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _CrossEntropySum.apply(hidden, weight, targets)
    return cross_entropy_tokens(hidden, weight, targets).sum()


@torch.no_grad()
def cross_entropy_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of every token in nats [n], 0 where the target is IGNORE. Not differentiable."""
    losses = []
    for part in _chunks(hidden.shape[0], weight.shape[0]):
        logits, at_target, _, counts = _logits(hidden[part], weight, targets[part])
        losses.append((torch.logsumexp(logits, dim=-1) - at_target) * counts)
    return torch.cat(losses)
