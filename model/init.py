"""Every initial standard deviation, in one table.

    matrices, embeddings       truncated normal (3 sigma), std = sqrt(2 / (5 width))       published ('scaled-zero')
    backbone output matrices   0 (published), or std / sqrt(2 layers)
    attractor output matrices  std: were they zero, f would be the constant y0 and its gates would get no gradient
    a loop's input matrix B    the identity (published)
    norm gains 1, channel gates at their configured start, value gates 0 (so that their factor is 1)

A parameter's numbers come from a generator of its own, seeded by (seed, name), so they depend neither on the order of
construction nor on how a layout cuts the model. The published code then orthogonalises; we do not (docs/design.md).
"""

from __future__ import annotations

import math
from hashlib import sha256

import torch
from torch import Tensor, nn

from model.attention import Attention, ValueGate
from model.config import BackboneConfig
from model.language_model import LanguageModel
from model.layers import MLP, ChannelGate, Layers, RMSNorm
from model.looped import DiagonalInjection
from model.refine import Refine


def standard_deviation(config: BackboneConfig) -> float:
    return math.sqrt(2 / (5 * config.width))


def materialise(module: nn.Module, device: torch.device) -> None:
    """Moves a module from the meta device to a real one: vectors get their first value, matrices are left to `initialise`."""
    marks = [dict(vars(parameter)) for parameter in module.parameters()]
    module.to_empty(device=device)
    for parameter, own in zip(module.parameters(), marks, strict=True):
        vars(parameter).update(own)  # to_empty makes new parameters, without what layers said about them (how they are sharded)
    for part in module.modules():
        if isinstance(part, (RMSNorm, ChannelGate, DiagonalInjection)):
            part.reset()


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Give every matrix of the model its first value, in place. What is still on the meta device belongs to another rank."""
    config = model.config.model
    common = standard_deviation(config)
    stds = {id(parameter): common for parameter in model.parameters() if parameter.ndim >= 2}
    output = 0.0 if config.zero_output_init else common / math.sqrt(2 * max(1, config.backbone_layers))
    inside = set(model.refine.modules()) if isinstance(model.refine, Refine) else set()
    for module in model.modules():
        for matrix in () if module in inside else _outputs(module):
            stds[id(matrix)] = output
        if isinstance(module, ValueGate):
            stds.update((id(parameter), 0.0) for parameter in module.parameters())
        if isinstance(module, DiagonalInjection) and not module.decay_log.is_meta:
            identity = module.input.get_parameter("weight")
            nn.init.eye_(identity)
            stds.pop(id(identity))
    for name, parameter in model.named_parameters():
        if id(parameter) in stds and not parameter.is_meta:
            _truncated_normal(parameter, stds[id(parameter)], _seed(seed, name), model.layers)


def _outputs(module: nn.Module) -> list[Tensor]:
    if isinstance(module, Attention):
        return list(module.out.parameters())
    return list(module.down.parameters()) if isinstance(module, MLP) else []


def _seed(seed: int, name: str) -> int:
    """32 bits of both: the CPU's generator drops every higher one."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _truncated_normal(parameter: Tensor, std: float, seed: int, layers: Layers) -> None:
    if std == 0:
        parameter.zero_()
        return
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(layers.whole_shape(parameter), dtype=torch.float32)
    nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
    parameter.copy_(layers.shard(values, parameter))
