"""The pieces (pretrain/pieces.py) of a live engine's masters, in every layout that a recipe may ask for.

Whether DeepSpeed's partitions lie as is assumed here was checked when the engine was built (pretrain/zero.py).
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from pretrain.engine import model_of
from pretrain.mesh import Mesh
from pretrain.pieces import Held, Pieces, Shard, flat_run, joined_shares, layout_record, whole
from pretrain.zero import client_optimizer, flat_groups, offsets_in


def pieces_of(engine: Any, mesh: Mesh) -> Pieces:
    """What this rank holds. Parameters keep their place for the life of an engine."""
    parameters = dict(model_of(engine).named_parameters())
    own = {id(parameter): _shard(name, parameter, mesh) for name, parameter in parameters.items()}
    layout = layout_record(mesh.layout, int(engine.zero_optimization_stage()))
    shapes = {name: _whole_shape(own[id(parameter)]) for name, parameter in parameters.items()}
    return Pieces(layout, shapes, _masters(engine, own, mesh))


def _masters(engine: Any, own: dict[int, Shard], mesh: Mesh) -> list[list[Held]]:
    wrapper, data, ranks = engine.optimizer, mesh.where.data, mesh.layout.data
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return [joined_shares([own[id(parameter)] for parameter in group], data, ranks) for group in wrapper.fp16_groups]
    if wrapper is client_optimizer(engine):
        return [whole(own[id(parameter)]) for group in wrapper.param_groups for parameter in group["params"]]
    return [
        flat_run([own[id(parameter)] for parameter in group], offsets_in(group, flat), master.numel(), data, ranks)
        for master, group, flat in zip(*flat_groups(wrapper), strict=True)
    ]


def _shard(name: str, parameter: Tensor, mesh: Mesh) -> Shard:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if mesh.layout.tensor > 1 and getattr(parameter, "tensor_model_parallel", False):
        return Shard(name, shape, parameter.partition_dim, mesh.layout.tensor, mesh.where.tensor)  # type: ignore[attr-defined]
    return Shard(name, shape)


def _whole_shape(shard: Shard) -> tuple[int, ...]:
    return tuple(size * shard.shards if axis == shard.dim else size for axis, size in enumerate(shard.shape))
