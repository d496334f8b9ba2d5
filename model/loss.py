"""Next-token cross-entropy against an unembedding, without ever holding the logits of all tokens.

    loss_i = logsumexp(W h_i) - (W h_i)[target_i]            summed over the tokens whose target is not IGNORE

Tokens go through in chunks. The differentiable form computes d loss / d h and d loss / d W in the same pass (softmax minus
one-hot, a chunk at a time), so that nothing is recomputed and backward only multiplies by the incoming scalar: three matrix
products altogether, the least there are. Logits are exponentiated in fp32 whatever the weights' precision.

Ranks may divide the vocabulary's rows (`Rows`): each then works on its own logits [n, v / ranks], and per chunk one maximum and one
sum of two numbers a token cross the ranks; d loss / d h is this rank's summand, which whoever handed h out adds up.

Shapes: hidden [n, w], weight [v, w], targets [n]; n tokens, w width, v vocabulary (this rank's rows of it).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
_LOGITS_AT_ONCE = 1 << 25  # elements: 128 MiB in fp32, large enough to keep a GPU's matrix units full


class Rows(Protocol):
    """How the rows of the vocabulary are divided over ranks."""

    ranks: int
    rank: int

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks. x is used up."""
        ...

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of x over the ranks. x is used up."""
        ...


class AllRows:
    """The vocabulary is whole."""

    ranks, rank = 1, 0

    def total(self, x: Tensor) -> Tensor:
        return x

    highest = total


ALL_ROWS = AllRows()


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, min(tokens, _LOGITS_AT_ONCE // vocabulary))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits of at least fp32, the targets' where they are here and else 0, targets as rows of `weight` or 0, 1 where a target counts,
    1 where it counts and is here)."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    counts = (targets != IGNORE).to(logits.dtype)
    if rows.ranks == 1:
        safe = targets.clamp_min(0)
        return logits, logits.gather(-1, safe[:, None]).squeeze(-1), safe, counts, counts
    own = targets - rows.rank * weight.shape[0]
    here = (own >= 0) & (own < weight.shape[0])
    safe, here = own * here, here.to(logits.dtype)
    return logits, logits.gather(-1, safe[:, None]).squeeze(-1) * here, safe, counts, here


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits, at_target, safe, counts, here = _logits(hidden[part], weight, targets[part], rows)
            highest = rows.highest(logits.amax(dim=-1))
            softmax = logits.sub_(highest[:, None]).exp_()  # in the logits' own memory: not yet divided by its sum
            sums, at_target = _added_up(softmax.sum(dim=-1), at_target, rows)
            total += ((sums.log() + highest - at_target) * counts).sum()
            softmax *= (counts / sums)[:, None]
            delta = softmax.scatter_add_(-1, safe[:, None], -here[:, None]).to(hidden.dtype)
            torch.mm(delta, weight, out=grad_hidden[part])
            piece = (delta.T @ hidden[part]).to(accumulate)
            grad_weight = piece if grad_weight is None else grad_weight.add_(piece)
        assert grad_weight is not None
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), None, None


def _added_up(sums: Tensor, at_target: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    if rows.ranks == 1:
        return sums, at_target
    sums, at_target = rows.total(torch.stack((sums, at_target))).unbind()
    return sums, at_target


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Sum of next-token losses in nats, a scalar of at least fp32; tokens whose target is IGNORE count nothing."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _CrossEntropySum.apply(hidden, weight, targets, rows)
    return cross_entropy_tokens(hidden, weight, targets, rows).sum()


@torch.no_grad()
def cross_entropy_tokens(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Loss of every token in nats [n], 0 where the target is IGNORE. Not differentiable."""
    losses = []
    for part in _chunks(hidden.shape[0], weight.shape[0]):
        logits, at_target, _, counts, _ = _logits(hidden[part], weight, targets[part], rows)
        spread = torch.logsumexp(logits, dim=-1)
        if rows.ranks > 1:
            highest = rows.highest(spread.clone())
            sums, at_target = _added_up((spread - highest).exp_(), at_target, rows)
            spread = sums.log() + highest
        losses.append((spread - at_target) * counts)
    return torch.cat(losses)
