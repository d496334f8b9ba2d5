"""The map of a deep equilibrium model (DEQ; Bai et al. 2019), the baseline in which a hidden state is solved for.

    f(z, x) = norm(h + D(h)),   h = z + norm_x(x)          x = backbone(E(tokens)), injected at every evaluation

z* is a hidden state: it starts at zero, is tied to the proposal by nothing but injection, and only the head reads it. D is the sum of
gated blocks, as in the attractor (model/attractor.py); the norm behind it bounds z, as the post-norm of Bai's Transformer does.
Shapes: z, x, f [b, s, w]; z and x in the solver's precision.
"""

from __future__ import annotations

from torch import Tensor

from model.attention import Context
from model.attractor import Increment
from model.config import AttractorConfig, BackboneConfig
from model.layers import Layers, RMSNorm


class Equilibrium(Increment):
    def __init__(self, backbone: BackboneConfig, config: AttractorConfig, layers: Layers) -> None:
        super().__init__(backbone, config, layers)
        self.input_norm = RMSNorm(backbone.width, backbone.norm_eps, layers)
        self.state_norm = RMSNorm(backbone.width, backbone.norm_eps, layers)

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        h = z + self.input_norm.wide(x)
        return self.state_norm.wide(h + self.increment(h, None, context))
