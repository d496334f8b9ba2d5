"""One pre-norm residual block, as what it adds: x + delta(x) in the backbone, y0 + delta(...) in the attractor.

    a = gate_a(attention(norm(x)));   delta(x) = a + gate_m(mlp(norm(x + a)))

Gates are the identity in the backbone. Working with the increment means the attractor never subtracts two large numbers.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import Attention, Context
from model.config import AttractorConfig, BackboneConfig
from model.layers import MLP, ChannelGate, Layers, RMSNorm


class Block(nn.Module):
    def __init__(
        self, config: BackboneConfig, layers: Layers, *, gates: AttractorConfig | None = None, value_embedding: bool = False
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps, layers)
        self.attention = Attention(config, layers, value_embedding)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, layers)
        self.mlp = MLP(config, layers)
        self.attention_gate = self._gate(config, layers, gates)
        self.mlp_gate = self._gate(config, layers, gates)

    @staticmethod
    def _gate(config: BackboneConfig, layers: Layers, gates: AttractorConfig | None) -> nn.Module:
        return nn.Identity() if gates is None else ChannelGate(config.width, gates.gate_initial, gates.gate_maximum, layers)

    def forward(self, x: Tensor, context: Context, memory: Tensor | None = None, value_embedding: Tensor | None = None) -> Tensor:
        """delta(x): what the block adds to x [b, s, w]. memory: keys and values are read from its norm instead of x's."""
        memory = None if memory is None else self.attention_norm(memory)
        attended = self.attention_gate(self.attention(self.attention_norm(x), context, memory, value_embedding))
        return attended + self.mlp_gate(self.mlp(self.mlp_norm(x + attended)))
