"""Causal self-attention with rotary positions, QK-norm, grouped queries and optional value embeddings.

    q, k = rms(rotate(Wq x)), rms(rotate(Wk m));  v = Wv m (+ 2 sigmoid(Wg x[:, :32]) * value_embedding)
    out = Wo softmax(q k^T / sqrt(head_dim) + mask) v,   m = x, or the proposal under cross-attention injection

The product goes through torch's scaled_dot_product_attention, which chooses the fused kernel of the device. Attention kept
inside documents passes a boolean mask; otherwise the kernel's own causal flag is used. In generation the keys and values of earlier
tokens come from a cache (model/cache.py), and x holds the new tokens alone.

Heads may be divided over ranks: x is this rank's tokens, and between the projections every rank sees all tokens of its heads.

Shapes: x [b, s, w]; mask [b, 1, s, keys], true where attention is allowed. Source: arXiv 2605.12466's code; nanochat for values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BackboneConfig
from model.fused import rms_norm
from model.layers import Layers
from model.rotary import rotary_tables, rotate

if TYPE_CHECKING:
    from model.cache import Cache


class Context(NamedTuple):
    """What every block of one forward pass shares: rotary tables [s, head_dim / 2] ([b, s, head_dim / 2] where rows are at different
    positions), the mask, None when plainly causal, and the tokens [b, s], for value embeddings and for what is drawn from them
    (model/noise.py). In use: the cache of the tokens before these, and which of these [b, s] are padding on the right."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    tokens: Tensor
    cache: Cache | None = None
    padding: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Context:
        """The context of some sequences of a batch that has no cache."""
        return self._replace(mask=None if self.mask is None else self.mask[index], tokens=self.tokens[index])


def make_context(config: BackboneConfig, tokens: Tensor, documents: Tensor | None) -> Context:
    """Context of tokens [b, s]; documents [b, s] numbers each token's document and keeps attention inside it."""
    length = tokens.shape[1]
    cos, sin = rotary_tables(length, config.head_dim, config.rope_base, tokens.device)
    if documents is None:
        return Context(cos, sin, None, tokens)
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    return Context(cos, sin, (same & causal)[:, None], tokens)


class ValueGate(nn.Module):
    """2 sigmoid(W x[..., :channels]) per key-value head: how much of a value embedding enters; 1 at initialisation."""

    def __init__(self, channels: int, heads: int, layers: Layers) -> None:
        super().__init__()
        self.channels = channels
        self.projection = layers.column(channels, heads)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.projection(x[..., : self.channels]))


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig, layers: Layers, value_embedding: bool = False) -> None:
        super().__init__()
        self.head_dim, self.qk_norm, self.enter = config.head_dim, config.qk_norm, layers.enter
        self.heads = layers.local_heads(config.heads)
        self.kv_heads = layers.local_heads(config.key_value_heads)
        self.query = layers.column(config.width, config.heads * config.head_dim)
        self.key = layers.column(config.width, config.key_value_heads * config.head_dim)
        self.value = layers.column(config.width, config.key_value_heads * config.head_dim)
        self.out = layers.row(config.heads * config.head_dim, config.width)
        self.value_gate = ValueGate(config.value_gate_channels, config.key_value_heads, layers) if value_embedding else None

    def forward(self, x: Tensor, context: Context, memory: Tensor | None = None, value_embedding: Tensor | None = None) -> Tensor:
        """x, memory [b, s, w] -> [b, s, w]; keys and values come from memory (x itself unless given)."""
        x = self.enter(x)
        memory = x if memory is None else self.enter(memory)
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim)
        k = self.key(memory).view(batch, length, self.kv_heads, self.head_dim)
        v = self.value(memory).view(batch, length, self.kv_heads, self.head_dim)
        if context.cache is None:
            q, k = self._placed(q, context), self._placed(k, context)
        else:  # few tokens: an operation costs more than what it computes
            q, k = self._placed(torch.cat((q, k), dim=2), context).split((self.heads, self.kv_heads), dim=2)
        if self.value_gate is not None and value_embedding is not None:
            v = v + self.value_gate(x)[..., None] * value_embedding.view_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.join(self, k, v)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.mask,
            is_causal=context.mask is None and q.shape[2] == k.shape[2],  # one new token sees all before it
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))

    def _placed(self, x: Tensor, context: Context) -> Tensor:
        """Queries or keys [b, s, heads, head_dim] turned by their positions, and normed."""
        x = rotate(x, context.cos, context.sin)
        return rms_norm(x, None, torch.finfo(x.dtype).eps) if self.qk_norm else x
