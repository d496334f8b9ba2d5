"""Whole weights out of an engine, by parameter name, as a checkpoint keeps them beside DeepSpeed's sharded state.

So evaluation, export and generation need no engine and no particular number of ranks (pretrain/loaded.py). With an average of the weights
there are two sets, and the average is preferred.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.agreement import rank
from pretrain.canonical import AVERAGE, WEIGHTS
from pretrain.ema import averaged_weights
from pretrain.engine import model_of
from pretrain.mesh import Mesh
from pretrain.zero import client_optimizer


@torch.no_grad()
def gather_weights(engine: Any, mesh: Mesh) -> dict[str, Tensor]:
    """Every parameter whole, by its canonical name, on the CPU, on rank 0; nothing on other ranks.

    Collective, a parameter at a time: ZeRO 3's shares over the data ranks, shards over the tensor ranks, and a stage's to rank 0.
    """
    weights = {}
    model = model_of(engine)
    holders = _holders(engine, model, mesh)
    for name, parameter in model.named_parameters():
        value: Tensor | None = None
        if holders[name] == mesh.where.pipe:
            with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
                value = _unsharded(parameter, mesh)
        value = _to_rank_0(value, parameter, model, holders[name], mesh)
        if value is not None:
            weights[name] = value.to("cpu", copy=True).contiguous()
    return weights


def _holders(engine: Any, model: Any, mesh: Mesh) -> dict[str, int]:
    """The first stage that holds each parameter."""
    if mesh.layout.pipeline == 1:
        return {name: 0 for name, _ in model.named_parameters()}
    from pretrain.stages import stage_names

    stages = engine.module.stages
    return {name: pipe for pipe in reversed(range(mesh.layout.pipeline)) for name in stage_names(model, stages, pipe)}


def _unsharded(parameter: Tensor, mesh: Mesh) -> Tensor:
    """The whole matrix, on every tensor rank."""
    if mesh.layout.tensor == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return parameter.detach()
    parts = [torch.empty_like(parameter) for _ in range(mesh.layout.tensor)]
    dist.all_gather(parts, parameter.detach().contiguous(), group=mesh.tensor_group)
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def _to_rank_0(value: Tensor | None, parameter: Tensor, model: Any, holder: int, mesh: Mesh) -> Tensor | None:
    """The value on rank 0, from the first rank of the stage that holds it."""
    source = mesh.layout.rank(holder, 0, 0)
    if mesh.rank == 0 and source != 0:
        like = next(own for own in model.parameters() if not own.is_meta)
        received = like.new_empty(model.layers.whole_shape(parameter))
        dist.recv(received, source)
        return received
    if mesh.rank == source != 0 and value is not None:
        dist.send(value.contiguous(), 0)
    return value if mesh.rank == 0 else None


def weight_files(engine: Any, mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds besides DeepSpeed's state, by file name: the weights, and their average where one is kept."""
    files_of_rank_0 = {f"{WEIGHTS}.safetensors": gather_weights(engine, mesh)}
    if client_optimizer(engine).ema is not None:
        with averaged_weights(engine):
            files_of_rank_0[f"{AVERAGE}.safetensors"] = gather_weights(engine, mesh)
    return files_of_rank_0 if rank() == 0 else {}
