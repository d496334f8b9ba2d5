"""The causal pre-norm Transformer that proposes y0 = backbone(E(x)).

With `recompute`, a block keeps only its input for backward and runs again there: one forward more, s*w a block of memory.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Context
from model.block import Block
from model.config import BackboneConfig
from model.layers import Layers


class Backbone(nn.Module):
    def __init__(self, config: BackboneConfig, layers: Layers, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        tables = [config.has_value_embedding(layer) for layer in range(config.backbone_layers)]
        self.blocks = nn.ModuleList(Block(config, layers, value_embedding=table) for table in tables)
        rows, width = config.vocabulary_size or 0, config.key_value_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(layer): layers.value_embedding(rows, width) for layer, table in enumerate(tables) if table}
        )

    def forward(self, x: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """x [b, s, w] the embedded tokens [b, s] -> the proposal [b, s, w]."""
        for layer in range(len(self.blocks)):
            x = self.layer(layer, x, tokens, context)
        return x

    def layer(self, layer: int, x: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """x after one more block."""
        block, table = self.blocks[layer], str(layer)
        values = self.value_embeddings[table](tokens) if table in self.value_embeddings else None
        if self.recompute and block.training:
            return x + checkpoint(block, x, context, None, values, use_reentrant=False, preserve_rng_state=False)
        return x + block(x, context, None, values)
