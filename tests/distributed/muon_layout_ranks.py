"""What every rank runs for test_muon_layouts: a small model cut over tensor ranks and pipeline stages, against one process.

The model's layers make their whole weights from a seed and keep their shard, so every layout starts from the same weights, and a
rank can compare its shards with the reference's without gathering. One process runs the same layers with one shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from model.roles import Role
from pretrain import muon, zero
from pretrain.config import TrainSection
from pretrain.ema import averaged_weights
from pretrain.layout import Layout
from pretrain.mesh import Mesh, connect
from pretrain.optimizer import apply_schedule, build_optimizer
from pretrain.runtime import process_group
from tests.distributed.muon_zero_ranks import (
    ACCUMULATION,
    SCHEDULE,
    SETTINGS,
    STEPS,
    VOCABULARY,
    Case,
    batch,
    deepspeed_config,
    module_weights,
    reference,
    settings_of,
    train_replica,
    whole_weights,
    worst,
)

WIDTH = 6
HIDDEN = [10, 14, 6, 6]
"""Of the blocks, the last of which is the attractor: with two data ranks matrices straddle the cut."""
ALONE = Mesh(Layout(), 0)


class _Copy(torch.autograd.Function):
    """The same on every tensor rank; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """Summed over tensor ranks; gradients are the same on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class Table(nn.Module):
    """The tied embedding, whole on every tensor rank and on the first and last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(99)) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


def unembed(table: Table, x: Tensor) -> Tensor:
    return F.linear(x, table.weight)


class Block(nn.Module):
    """x + down tanh(up (gain x) + bias), with up cut along its rows and down along its columns.

    parts: in how many sums of products, each rounded, this process computes its shard: one process with `parts` rounds where
    that many tensor ranks do.
    """

    def __init__(self, index: int, mesh: Mesh, parts: int = 1) -> None:
        super().__init__()
        self.mesh, self.parts = mesh, parts
        generator = torch.Generator().manual_seed(index)
        hidden = HIDDEN[index]
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.up = self._shard(torch.randn(hidden, WIDTH, generator=generator) * 0.5, 0)
        self.bias = self._shard(torch.randn(hidden, generator=generator) * 0.5, 0)
        self.down = self._shard(torch.randn(WIDTH, hidden, generator=generator) * 0.5, 1)

    def _shard(self, whole: Tensor, dim: int) -> nn.Parameter:
        parameter: Any = nn.Parameter(whole.chunk(self.mesh.layout.tensor, dim)[self.mesh.where.tensor].clone())
        parameter.tensor_model_parallel, parameter.partition_dim = True, dim
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        inside, group = x * self.gain, self.mesh.tensor_group
        if group is not None:
            inside = _Copy.apply(inside, group)
        parts = zip(self.up.chunk(self.parts), self.bias.chunk(self.parts), self.down.chunk(self.parts, 1), strict=True)
        first, *rest = [F.linear(torch.tanh(F.linear(inside, up, bias)), down) for up, bias, down in parts]
        out = sum(rest, first)
        return x + (out if group is None else _Sum.apply(out, group))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Toy(nn.Module):
    """All layers in one process, under the names a PipelineModule gives them."""

    def __init__(self, mesh: Mesh, parts: int = 1) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embedding": Table()})
        for index in range(len(HIDDEN)):
            self.add_module(str(index + 1), Block(index, mesh, parts))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        table = self.tied_modules["embedding"]
        assert isinstance(table, Table)
        x = table(tokens)
        for index in range(len(HIDDEN)):
            x = self.get_submodule(str(index + 1))(x)
        return loss_of(unembed(table, x), targets)


def stages(mesh: Mesh) -> PipelineModule:
    """Six layers in equal parts: every stage has backbone blocks, and the last one has roles that the first has not."""
    layers = [
        TiedLayerSpec("embedding", Table),
        *(LayerSpec(Block, index, mesh) for index in range(len(HIDDEN))),
        TiedLayerSpec("embedding", Table, forward_fn=unembed),
    ]
    return PipelineModule(layers, topology=mesh.grid.topology(), loss_fn=loss_of, partition_method="uniform")


def roles_of(model: nn.Module) -> dict[str, Role]:
    roles = {}
    for name, parameter in model.named_parameters():
        if name.startswith("tied_modules"):
            roles[name] = Role.EMBEDDING
        elif name.startswith(f"{len(HIDDEN)}."):
            roles[name] = Role.ATTRACTOR_MATRIX if parameter.ndim == 2 else Role.ATTRACTOR_VECTOR
        else:
            roles[name] = Role.BACKBONE_MATRIX if parameter.ndim == 2 else Role.BACKBONE_VECTOR
    return roles


def make_engine(case: Case, mesh: Mesh, other_roles: dict[str, Role] | None = None) -> Any:
    model = stages(mesh) if mesh.layout.pipeline > 1 else Toy(mesh)
    mpu = None if mesh.layout.pipeline > 1 else mesh.grid
    optimizer = build_optimizer(model, roles_of(model) | (other_roles or {}), settings_of(case))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case), mpu=mpu, dist_init_required=False)
    zero.attach(engine, SETTINGS["clip"], mesh)
    return engine


def train(engine: Any, mesh: Mesh, first: int, last: int) -> tuple[list[float], list[float]]:
    if mesh.layout.pipeline == 1:
        return train_replica(engine, first, last, mesh.where.data)
    losses, norms = [], []
    for step in range(first, last):
        apply_schedule(zero.client_optimizer(engine), step, SCHEDULE, STEPS)
        losses.append(float(engine.train_batch(batch(step, micro, mesh.where.data) for micro in range(ACCUMULATION))))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


@contextmanager
def orthogonalisations() -> Iterator[list[list[int]]]:
    """Shapes of the matrices that this rank orthogonalises within the context."""
    done: list[list[int]] = []
    real = muon.orthogonalised

    def counted(matrices: Any, steps: int, dtype: torch.dtype) -> list[Tensor]:
        done.extend(list(matrix.shape) for matrix in matrices)
        return real(matrices, steps, dtype)

    muon.orthogonalised = counted
    yield done
    muon.orthogonalised = real


def own(engine: Any, whole: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Of whole tensors, this rank's shards of what its stage holds."""
    shards = {}
    for name, parameter in engine.module.named_parameters():
        cut = getattr(parameter, "tensor_model_parallel", False)
        shards[name] = whole[name].chunk(mesh.layout.tensor, parameter.partition_dim)[mesh.where.tensor] if cut else whole[name]
    return shards


def parity(case: Case, mesh: Mesh) -> dict[str, Any]:
    """How far an engine's five steps are from the reference's, and who did what of Muon."""
    alone = Toy(ALONE, mesh.layout.tensor if case.precision == "bf16" else 1)
    wanted = reference(case, alone, roles_of(alone), mesh.layout.data)
    engine = make_engine(case, mesh)
    optimizer = zero.client_optimizer(engine)
    start = whole_weights(engine)
    with orthogonalisations() as done:
        losses, norms = train(engine, mesh, 0, STEPS)
    weights, mine = whole_weights(engine), own(engine, wanted["weights"], mesh)
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "muon_tensors": optimizer.muon_tensors,
        "orthogonalised": done,
        "momentum": sum(state["momentum_buffer"].numel() for state in optimizer.state.values() if "momentum_buffer" in state),
        "weights": worst(weights, mine),
        "moved": min(float((weights[name] - start[name]).norm() / start[name].norm()) for name in weights),
        "losses": max(abs(a / b - 1) for a, b in zip(losses, wanted["losses"], strict=True)),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, wanted["norms"], strict=True)),
        "smallest_norm": min(norms),
    }
    if case.ema is not None:
        averages = own(engine, wanted["averages"], mesh)
        before = module_weights(engine)
        with averaged_weights(engine):
            result["average"] = worst(module_weights(engine), averages)
        after = module_weights(engine)
        result["apart"] = worst(before, averages)
        result["restored"] = all(torch.equal(before[name], after[name]) for name in before)
    engine.destroy()
    return result


def skipped(case: Case, mesh: Mesh) -> dict[str, Any]:
    """What a non-finite gradient of one matrix (or shard) on rank 1 does: nothing may change on any rank, and all must know."""
    engine = make_engine(case, mesh)
    train(engine, mesh, 0, 1)
    before = whole_weights(engine)
    matrix = next(parameter for name, parameter in engine.module.named_parameters() if name.endswith("up"))
    handle = matrix.register_hook(lambda gradient: gradient * (torch.nan if mesh.rank == 1 else 1.0))
    _, (norm,) = train(engine, mesh, 1, 2)
    handle.remove()
    applied, unchanged = engine.was_step_applied(), all(torch.equal(before[n], value) for n, value in whole_weights(engine).items())
    (loss,), _ = train(engine, mesh, 1, 2)
    engine.destroy()
    return {"applied": applied, "finite": math.isfinite(norm), "unchanged": unchanged, "goes_on": math.isfinite(loss)}


def refusals(mesh: Mesh) -> dict[str, str]:
    """What attaching says to a Muon matrix that tensor ranks hold whole, to another mesh than the engine's, and when rank 1 alone
    gives Muon more."""
    more: dict[str, Role] = {"4.up": Role.BACKBONE_MATRIX} if mesh.rank == 1 else {}
    wrong: dict[str, tuple[Mesh, dict[str, Role]]] = {
        "whole": (mesh, {"tied_modules.embedding.weight": Role.BACKBONE_MATRIX}),
        "mesh": (replace(mesh, layout=Layout(data=mesh.layout.ranks)), {}),
        "unequal": (mesh, more),
    }
    said = {}
    for name, (other, roles) in wrong.items():
        try:
            make_engine(Case(1), other, roles)
        except RuntimeError as error:
            said[name] = str(error)
    return said


def all_cases(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every layout with its cases of parity and of skipping."""
    torch.set_num_threads(1)
    results = []
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        for wanted in layouts:
            mesh = connect(Layout(**wanted["layout"]), device)
            found: dict[str, Any] = {
                "parity": [parity(Case(**case), mesh) for case in wanted["parity"]],
                "skipped": [skipped(Case(**case), mesh) for case in wanted["skipped"]],
            }
            if mesh.layout.pipeline == 1:
                found["refused"] = refusals(mesh)
            results.append(found)
    return results
