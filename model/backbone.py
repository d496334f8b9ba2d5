"""A run of causal pre-norm Transformer blocks with their value embeddings: the whole backbone, or prelude, core and coda of a loop.

With `recompute`, a block keeps only its input for backward and runs again there: one forward more, s*w a block of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Context
from model.block import Block
from model.config import BackboneConfig
from model.layers import Layers


class Backbone(nn.Module):
    """The blocks `which` of a model, numbered from 0 here."""

    def __init__(self, config: BackboneConfig, layers: Layers, which: range, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        tables = [config.has_value_embedding(layer) for layer in which]
        self.blocks = nn.ModuleList(Block(config, layers, value_embedding=table) for table in tables)
        rows, width = config.vocabulary_size or 0, config.key_value_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(layer): layers.value_embedding(rows, width) for layer, table in enumerate(tables) if table}
        )

    def forward(self, x: Tensor, context: Context, values: Sequence[Tensor | None] | None = None) -> Tensor:
        """x [b, s, w] after all the blocks. values: as `values` gives them, where they are to be looked up once for many calls."""
        for layer in range(len(self.blocks)):
            x = self._applied(layer, x, context, self._value(layer, context) if values is None else values[layer])
        return x

    def layer(self, layer: int, x: Tensor, context: Context) -> Tensor:
        """x after one more block."""
        return self._applied(layer, x, context, self._value(layer, context))

    def values(self, context: Context) -> list[Tensor | None]:
        """The value embeddings of the context's tokens, block by block."""
        return [self._value(layer, context) for layer in range(len(self.blocks))]

    def _value(self, layer: int, context: Context) -> Tensor | None:
        table = str(layer)
        return self.value_embeddings[table](context.tokens) if table in self.value_embeddings else None

    def _applied(self, layer: int, x: Tensor, context: Context, value: Tensor | None) -> Tensor:
        block = self.blocks[layer]
        if self.recompute and block.training:
            return x + checkpoint(block, x, context, None, value, use_reentrant=False, preserve_rng_state=False)
        return x + block(x, context, None, value)
