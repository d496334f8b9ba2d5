"""The only place that knows how DeepSpeed lays out master weights: reads it, checks it, and refuses what it does not know.

What `deepspeed.initialize` makes of a client optimizer (0.19.8), and what its groups hold afterwards:

    ZeRO 0 fp32    the optimizer itself        the model's parameters
    ZeRO 0 bf16    FP16_UnfusedOptimizer       fp32 copies, one a parameter
    ZeRO 1 bf16    BF16_Optimizer              one flat partition a group   (with grad_accum_dtype fp32)
    ZeRO 1, 2      DeepSpeedZeroOptimizer      one flat partition a group
    ZeRO 3         ..._Stage3                  one flat partition a sub-group: the ranks' shares of its parameters, joined

ZeRO 1 and 2 lay a group's parameters end to end, pad, and cut the whole into equal runs: a matrix may straddle ranks.
ZeRO 3 pads and cuts every parameter by itself. All offsets are checked against where the weights really are.
Either cuts over the data ranks what this rank's stage and tensor rank hold, so the same holds for pipeline stages, whose groups
differ, and for tensor ranks, whose groups must not: that is checked too. Muon exchanges over all ranks of the stage.
These are internals, so another version than the one read here is refused. Refuses also a Muon matrix that every tensor rank holds
whole: it would be orthogonalised by each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.schedule import ReduceGrads, ReduceTiedGrads
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from pretrain.errors import Refusal
from pretrain.mesh import Mesh
from pretrain.muon import Matrix, MatrixPieces, Piece, cut_contiguously, cut_each, on_every_shard
from pretrain.optimizer import MUON, MuonAdamW

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DEEPSPEED_VERSION = "0.19.8"


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(f"DeepSpeed's partitions are not laid out as version {DEEPSPEED_VERSION} lays them out: {what}.")


def client_optimizer(engine: DeepSpeedEngine) -> MuonAdamW:
    """The optimizer that was given to `deepspeed.initialize`."""
    optimizer = engine.basic_optimizer
    _require(isinstance(optimizer, MuonAdamW), f"the client optimizer is a {type(optimizer).__name__}")
    return optimizer


def attach(engine: DeepSpeedEngine, clip: float, mesh: Mesh) -> None:
    """Call once, right after `deepspeed.initialize`, on all ranks: fits the client optimizer to the engine's layout.

    clip: bound on the global gradient norm, 0 for none. DeepSpeed clips by its own `gradient_clipping`; only for fp32
    with ZeRO 0, where it neither reports the norm nor skips a non-finite one, the optimizer does all three, and
    `gradient_clipping` must be 0. Raises Refusal for another DeepSpeed, RuntimeError for a layout that is not as expected.
    """
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise Refusal(
            f"DeepSpeed {deepspeed.__version__} is installed, but the optimizer reads internals of {DEEPSPEED_VERSION}: "
            f"run `pip install deepspeed=={DEEPSPEED_VERSION}`."
        )
    optimizer, wrapper = client_optimizer(engine), engine.optimizer
    sharded = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | BF16_Optimizer)
    _require(sharded or not mesh.layout.cuts_model, f"{type(wrapper).__name__} for a model cut by {mesh.layout.describe()}")
    if wrapper is optimizer:
        _require(engine.gradient_clipping() == 0, "for fp32 with ZeRO 0 gradient_clipping must be 0, the optimizer clips")
        optimizer.guard_gradients(clip)
        return
    _require(engine.gradient_clipping() == clip, f"gradient_clipping is {engine.gradient_clipping()}, not {clip}")
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        _undo_first_step(optimizer, wrapper)
        return
    if mesh.layout.pipeline > 1 and isinstance(wrapper, DeepSpeedZeroOptimizer):
        _measure_norm_once(wrapper)
    stage3 = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)
    pieces = _stage3_pieces(optimizer, wrapper, mesh) if stage3 else _flat_pieces(optimizer, wrapper, mesh)
    _compare_tensor_ranks([layout.matrices for layout in pieces.values()], mesh)
    optimizer.attach_pieces(pieces)


def _undo_first_step(optimizer: MuonAdamW, wrapper: FP16_UnfusedOptimizer) -> None:
    """It steps once with zero gradients to make states: that decays the master weights and advances AdamW's count."""
    wrapper.refresh_fp32_params()
    optimizer.state.clear()


def _measure_norm_once(wrapper: DeepSpeedZeroOptimizer) -> None:
    """It sums the norm over the stages group by group, and stages hold different roles, hence numbers of groups: they would wait
    for each other for ever. Here all groups are measured as one, which takes two all-reduces in all."""

    def scaled_global_norm(norm_type: float = 2) -> Tensor:
        gradients, parameters = [], []
        for index, own in enumerate(wrapper.params_in_partition):
            found = [gradient for gradient in wrapper.averaged_gradients[index] if not getattr(gradient, "_zero_padding", False)]
            gradients += found[: len(own)]  # what is left over is padding
            parameters += own
        _require(len(gradients) == len(parameters), "a partition holds other gradients than its parameters'")
        return wrapper.get_grad_norm_direct(gradients, parameters, norm_type)

    wrapper.scaled_global_norm = scaled_global_norm


def _check_data_group(group: dist.ProcessGroup, mesh: Mesh) -> None:
    ours = next(ranks for ranks in mesh.layout.groups("data") if mesh.rank in ranks)
    theirs = dist.get_process_group_ranks(group)
    _require(list(theirs) == ours, f"it cuts over the ranks {list(theirs)}, and the data ranks of {mesh.layout.describe()} are {ours}")


def _compare_tensor_ranks(matrices: list[tuple[Matrix, ...]], mesh: Mesh) -> None:
    """Pieces are told from this rank's own partitions, so the others of the stage must hold shards of the same matrices."""
    everyone: list[Any] = [None] * (mesh.layout.data * mesh.layout.tensor)
    dist.all_gather_object(everyone, matrices, group=mesh.stage_group)
    _require(all(other == matrices for other in everyone), "the ranks of a stage hold shards of different matrices")


def _flat_pieces(optimizer: MuonAdamW, wrapper: Any, mesh: Mesh) -> dict[Tensor, MatrixPieces]:
    """ZeRO 1 and 2: where each parameter lies is read off its storage, which is a view of the group's flat weights."""
    masters, groups, flats = flat_groups(wrapper)
    _require(len(masters) == len(optimizer.param_groups), "not one partition a group")
    pieces = {}
    for index, (group, master, whole) in enumerate(zip(optimizer.param_groups, masters, flats, strict=True)):
        _require(len(group["params"]) == 1 and group["params"][0] is master, f"group {group['name']} holds other tensors")
        _check_data_group(wrapper.real_dp_process_group[index], mesh)
        partition = master.numel()
        _require(partition * mesh.layout.data == whole.numel(), f"partitions of {partition} do not make {whole.numel()} elements")
        own = whole.narrow(0, mesh.where.data * partition, partition)
        _require(torch.equal(own.to(master.dtype), master.detach()), "the fp32 partition is not this rank's run of the weights")
        if group["update"] == MUON:
            parameters, offsets = groups[index], offsets_in(groups[index], whole)
            cut = cut_contiguously([parameter.numel() for parameter in parameters], offsets, partition, mesh.layout.data)
            pieces[master] = _pieces_on_stage(parameters, [parameter.shape for parameter in parameters], cut, wrapper, mesh)
    return pieces


def flat_groups(wrapper: Any) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """ZeRO 1 and 2, by group: this rank's master, the parameters, and the buffer of whole weights that both are of."""
    if isinstance(wrapper, BF16_Optimizer):
        return wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, wrapper.bf16_groups_flat
    return wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups, wrapper.bit16_groups_flat


def offsets_in(parameters: Sequence[Tensor], whole: Tensor) -> list[int]:
    """Where each parameter starts in its group's flat weights."""
    offsets = [(parameter.data_ptr() - whole.data_ptr()) // whole.element_size() for parameter in parameters]
    for parameter, offset in zip(parameters, offsets, strict=True):
        view = whole.narrow(0, offset, parameter.numel()) if 0 <= offset <= whole.numel() - parameter.numel() else whole[:0]
        _require(view.data_ptr() == parameter.data_ptr() and view.numel() == parameter.numel(), "a parameter lies outside its group")
    return offsets


def _stage3_pieces(optimizer: MuonAdamW, wrapper: DeepSpeedZeroOptimizer_Stage3, mesh: Mesh) -> dict[Tensor, MatrixPieces]:
    """ZeRO 3: checked against the parameters' own shares. Their padding is uninitialised memory: zeroed here, it stays zero."""
    pieces = {}
    for index, (master, parameters) in enumerate(zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)):
        _check_data_group(wrapper.sub_group_process_groups[index], mesh)
        cut = cut_each([parameter.ds_numel for parameter in parameters], mesh.layout.data)
        _require(master.numel() == sum(p.ds_tensor.numel() for p in parameters), "a partition is not its parameters' shares, joined")
        clean = torch.zeros_like(master)
        for piece in cut[mesh.where.data]:
            share = parameters[piece.matrix].ds_tensor.detach().narrow(0, 0, piece.size).to(master.dtype)
            held = master.detach().narrow(0, piece.offset, piece.size)
            _require(torch.equal(share, held), "a partition does not hold its parameters' shares in order")
            clean.narrow(0, piece.offset, piece.size).copy_(held)
        master.data.copy_(clean)
        if optimizer.param_groups[wrapper.sub_group_to_group_id[index]]["update"] == MUON:
            pieces[master] = _pieces_on_stage(parameters, [parameter.ds_shape for parameter in parameters], cut, wrapper, mesh)
    return pieces


def _pieces_on_stage(
    parameters: Sequence[Tensor], shapes: Sequence[torch.Size], cut: Sequence[Sequence[Piece]], wrapper: Any, mesh: Mesh
) -> MatrixPieces:
    """From `cut`, how data ranks share this tensor rank's `parameters` of `shapes`, to all ranks of the stage."""
    tensor = mesh.layout.tensor
    matrices = [_matrix(p, shape, tensor, wrapper.param_names[p]) for p, shape in zip(parameters, shapes, strict=True)]
    rank = mesh.where.data * tensor + mesh.where.tensor
    _require(dist.get_rank(mesh.stage_group) == rank, f"rank {mesh.rank} is not number {rank} of its stage")
    return MatrixPieces(tuple(matrices), on_every_shard(cut, matrices, tensor), rank, mesh.stage_group)


def _matrix(parameter: Tensor, shape: torch.Size, tensor: int, name: str) -> Matrix:
    """The whole matrix of which this rank's parameter of `shape` is the shard."""
    _require(len(shape) == 2, f"Muon takes matrices, not {name} of shape {tuple(shape)}")
    rows, columns = shape
    if tensor == 1:
        return Matrix(rows, columns)
    if not getattr(parameter, "tensor_model_parallel", False):
        raise RuntimeError(
            f"Muon was given {name}, which every one of the {tensor} tensor ranks holds whole, so that each would orthogonalise it: cut it "
            f"over them, or let its role take AdamW."
        )
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    _require(getattr(parameter, "partition_stride", 1) == 1, f"the shards of {name} are not contiguous")
    return Matrix(rows * tensor, columns, 0, tensor) if dim == 0 else Matrix(rows, columns * tensor, 1, tensor)


def reduce_tied_last(engine: Any) -> None:
    """Of a pipeline with a tied table: adds up its gradients over the data ranks first, and over the two stages then.

    DeepSpeed does it the other way round. But the order in which a ring sums an element depends on where it lies in its stage's buffer,
    so from three data ranks on the two copies would drift apart, bit by bit. Added up last, they stay equal.
    """
    wrapper = engine.optimizer

    def reduced(weight: Tensor) -> list[Tensor]:
        if isinstance(wrapper, BF16_Optimizer):
            return [weight._hp_grad]  # type: ignore[attr-defined]
        index = next(i for i, group in enumerate(wrapper.bit16_groups) if any(parameter is weight for parameter in group))
        _require(len(wrapper.bit16_groups[index]) == 1, "the tied table shares its group")
        return list(wrapper.averaged_gradients[index][: len(wrapper.params_in_partition[index])])

    def reduce(engine: Any) -> None:
        engine._exec_reduce_grads()
        for weight, group in engine.module.get_tied_weights_and_groups():
            for gradient in reduced(weight):
                dist.all_reduce(gradient, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: lambda engine: None, ReduceGrads: reduce}


def masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The fp32 tensors that this rank's optimizer updates, hence the keys of its state: partitions, or whole parameters."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return list(wrapper.fp32_partitioned_groups_flat)
    return [tensor for group in client_optimizer(engine).param_groups for tensor in group["params"]]


@torch.no_grad()
def publish(engine: DeepSpeedEngine) -> None:
    """Makes the module compute with the present values of `masters`. Collective."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        wrapper._partition_all_parameters()
        for index in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        weights = [weight for group in wrapper.fp16_groups for weight in group]
        for master, weight in zip(masters(engine), weights, strict=True):
            weight.copy_(master)
    elif wrapper is not client_optimizer(engine):
        wrapper.update_lp_params()
