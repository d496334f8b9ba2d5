"""The network of every reasoning model: a few post-norm blocks, in which each position sees all others.

    net(s, i) = block_n( ... block_1(s + i))
    h <- rms(h + mix(h));  h <- rms(h + W_down (silu(gate) up)),   [gate, up] = W_gate_up h

    attention   W_out softmax(q k^T / sqrt(head_dim)) v,   [q, k, v] = W_qkv h,  q and k turned by their positions
    mlp         the SwiGLU over the L positions in place of channels, one for all channels; its norm is over positions too (TRM)

Norms have no gain, matrices no bias. The result of a norm has size sqrt(width), so states stay bounded however often the network is
applied. Two matrices that read the same input are one product. The mixing MLP multiplies from the left, W [2 h, L] x [L, w]: nothing is
transposed, and its second dimension is the width, which a matrix unit likes better than an odd number of positions.

Shapes: b batch, L positions, w width, h hidden. Source: TRM (arXiv 2510.04871) and HRM (2506.21734), whose blocks are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.fused import rms_norm
from model.reasoning.attention import attend
from model.reasoning.config import ReasonerConfig
from model.rotary import rotate

Tables = tuple[Tensor, Tensor] | None
"""(cos, sin), each [L, head_dim / 2] in the model's precision; None without rotary positions."""


class SwiGLU(nn.Module):
    """W_down (silu(gate) up) over the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mixing(SwiGLU):
    """The same over positions: x [b, L, w] -> [b, L, w]."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(_for_each(self.gate_up.weight, x), x).chunk(2, dim=1)
        return torch.bmm(_for_each(self.down.weight, x), F.silu(gate) * up)


def _for_each(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix.expand(x.shape[0], -1, -1)


class Attention(nn.Module):
    """Every position attends to all: x [b, L, w] -> [b, L, w]."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim))
        turned, v = qkv.split((2 * self.heads, self.heads), dim=2)
        q, k = (turned if tables is None else rotate(turned, *tables)).split(self.heads, dim=2)
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.attention = Attention(config) if config.mixing == "attention" else None
        self.mixing = Mixing(config.length, config.mixing_hidden) if config.mixing == "mlp" else None
        self.mlp = SwiGLU(config.width, config.hidden)
        self.eps = config.norm_eps

    def forward(self, h: Tensor, tables: Tables) -> Tensor:
        if self.attention is not None:
            h = rms_norm(h + self.attention(h, tables), None, self.eps)
        elif self.mixing is not None:  # the norm is over positions: channels are its rows
            h = rms_norm((h + self.mixing(h)).transpose(1, 2), None, self.eps).transpose(1, 2)
        return rms_norm(h + self.mlp(h), None, self.eps)


class Network(nn.Module):
    """An update of a latent: (1 - s) state + s net(state, injection) + noise; s = 1 and no noise but of the equilibrium variant."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.step_size = config.step_size

    def forward(self, state: Tensor, injection: Tensor, tables: Tables, noise: Tensor | None = None) -> Tensor:
        """state [b, L, w] in the model's precision or, inside a solver, in fp32, which is rounded once, after the injection is added;
        the result has the state's precision where the step is partial, else the model's."""
        h = (state + injection).to(injection.dtype)
        for block in self.blocks:
            h = block(h, tables)
        if self.step_size != 1:
            h = torch.lerp(state, h.to(state.dtype), self.step_size)
        return h if noise is None else h + noise
