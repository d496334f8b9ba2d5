"""The only place that knows how DeepSpeed lays out master weights: reads it, checks it, and refuses what it does not know.

What `deepspeed.initialize` makes of a client optimizer (0.19.8), and what its groups hold afterwards:

    ZeRO 0 fp32    the optimizer itself        the model's parameters
    ZeRO 0 bf16    FP16_UnfusedOptimizer       fp32 copies, one a parameter
    ZeRO 1 bf16    BF16_Optimizer              one flat partition a group   (with grad_accum_dtype fp32)
    ZeRO 1, 2      DeepSpeedZeroOptimizer      one flat partition a group
    ZeRO 3         ..._Stage3                  one flat partition a sub-group: the ranks' shares of its parameters, joined

ZeRO 1 and 2 lay a group's parameters end to end, pad, and cut the whole into equal runs: a matrix may straddle ranks.
ZeRO 3 pads and cuts every parameter by itself. All offsets are checked against where the weights really are.
These are internals, so another version than the one read here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from pretrain.errors import Refusal
from pretrain.muon import MatrixPieces, cut_contiguously, cut_each
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


def attach(engine: DeepSpeedEngine, clip: float) -> None:
    """Call once, right after `deepspeed.initialize`: fits the client optimizer to the engine's layout.

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
    if wrapper is optimizer:
        _require(engine.gradient_clipping() == 0, "for fp32 with ZeRO 0 gradient_clipping must be 0, the optimizer clips")
        optimizer.guard_gradients(clip)
        return
    _require(engine.gradient_clipping() == clip, f"gradient_clipping is {engine.gradient_clipping()}, not {clip}")
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        _undo_first_step(optimizer, wrapper)
        return
    optimizer.attach_pieces(_matrix_pieces(optimizer, wrapper))


def _undo_first_step(optimizer: MuonAdamW, wrapper: FP16_UnfusedOptimizer) -> None:
    """It steps once with zero gradients to make states: that decays the master weights and advances AdamW's count."""
    wrapper.refresh_fp32_params()
    optimizer.state.clear()


def _matrix_pieces(optimizer: MuonAdamW, wrapper: Any) -> dict[Tensor, MatrixPieces]:
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return _stage3_pieces(optimizer, wrapper)
    if isinstance(wrapper, BF16_Optimizer):
        masters, groups, whole = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, wrapper.bf16_groups_flat
    else:
        _require(isinstance(wrapper, DeepSpeedZeroOptimizer), f"it wrapped the optimizer in a {type(wrapper).__name__}")
        masters, groups, whole = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups, wrapper.bit16_groups_flat
    _require(len(masters) == len(optimizer.param_groups), "not one partition a group")
    pieces = {}
    for index, group in enumerate(optimizer.param_groups):
        _require(len(group["params"]) == 1 and group["params"][0] is masters[index], f"group {group['name']} holds other tensors")
        if group["update"] == MUON:
            pieces[masters[index]] = _flat_pieces(masters[index], groups[index], whole[index], wrapper.real_dp_process_group[index])
    return pieces


def _flat_pieces(master: Tensor, parameters: Sequence[Tensor], whole: Tensor, group: dist.ProcessGroup) -> MatrixPieces:
    """ZeRO 1 and 2: where each parameter lies is read off its storage, which is a view of the group's flat weights."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    partition = master.numel()
    _require(partition * ranks == whole.numel(), f"{ranks} partitions of {partition} do not make {whole.numel()} elements")
    own = whole.narrow(0, rank * partition, partition)
    _require(torch.equal(own.to(master.dtype), master.detach()), "the fp32 partition is not this rank's run of the weights")
    offsets = [(parameter.data_ptr() - whole.data_ptr()) // whole.element_size() for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, offset in zip(parameters, offsets, strict=True):
        view = whole.narrow(0, offset, parameter.numel()) if 0 <= offset <= whole.numel() - parameter.numel() else whole[:0]
        _require(view.data_ptr() == parameter.data_ptr() and view.numel() == parameter.numel(), "a parameter lies outside its group")
    shapes = [_matrix_shape(parameter.shape) for parameter in parameters]
    return MatrixPieces(tuple(shapes), cut_contiguously(sizes, offsets, partition, ranks), rank, group)


def _stage3_pieces(optimizer: MuonAdamW, wrapper: DeepSpeedZeroOptimizer_Stage3) -> dict[Tensor, MatrixPieces]:
    """ZeRO 3: checked against the parameters' own shares. Their padding is uninitialised memory: zeroed here, it stays zero."""
    pieces = {}
    for index, (master, parameters) in enumerate(zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)):
        group = wrapper.sub_group_process_groups[index]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        cut = cut_each([parameter.ds_numel for parameter in parameters], ranks)
        _require(master.numel() == sum(p.ds_tensor.numel() for p in parameters), "a partition is not its parameters' shares, joined")
        clean = torch.zeros_like(master)
        for piece in cut[rank]:
            share = parameters[piece.matrix].ds_tensor.detach().narrow(0, 0, piece.size).to(master.dtype)
            held = master.detach().narrow(0, piece.offset, piece.size)
            _require(torch.equal(share, held), "a partition does not hold its parameters' shares in order")
            clean.narrow(0, piece.offset, piece.size).copy_(held)
        master.data.copy_(clean)
        if optimizer.param_groups[wrapper.sub_group_to_group_id[index]]["update"] == MUON:
            pieces[master] = MatrixPieces(tuple(_matrix_shape(parameter.ds_shape) for parameter in parameters), cut, rank, group)
    return pieces


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    _require(len(shape) == 2, f"Muon takes matrices, not a tensor of shape {tuple(shape)}")
    return shape[0], shape[1]


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
