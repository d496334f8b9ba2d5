"""The process groups of a layout, made once from pretrain.layout and given to DeepSpeed's grid and megatron's parallel_state alike.

Both libraries number ranks by their own rules; here their groups are compared with ours, so that a version that numbers otherwise
is refused instead of mixing up gradients. A purely data-parallel run needs none of them: its data group is the world.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.agreement import rank
from pretrain.layout import Axis, Coordinates, Layout


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a layout and the groups it belongs to."""

    layout: Layout
    rank: int
    tensor_group: dist.ProcessGroup | None = None
    """Ranks that share this rank's matrices; None where there is one."""
    stage_group: dist.ProcessGroup | None = None
    """All ranks of this pipeline stage: data x tensor. None for the world."""
    grid: Any = None
    """DeepSpeed's PipelineParallelGrid, to be its mpu; None for a purely data-parallel run."""

    @property
    def where(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def last_stage(self) -> bool:
        return self.where.pipe == self.layout.pipeline - 1

    @property
    def tells(self) -> bool:
        """Whether this rank speaks for its replica: it sees the loss, and no other tensor rank repeats it."""
        return self.last_stage and self.where.tensor == 0

    @property
    def tellers(self) -> list[int]:
        """The ranks that speak, one a replica, by data coordinate."""
        return [self.layout.rank(self.layout.pipeline - 1, data, 0) for data in range(self.layout.data)]


ALONE = Mesh(Layout(), 0)
"""A process that is a whole run."""


def connect(layout: Layout, device: torch.device) -> Mesh:
    """The mesh of this rank. All ranks call it, once, after the process group is up."""
    if not layout.cuts_model:
        return Mesh(layout, rank())
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
    from megatron.core import parallel_state

    if device.type == "cpu":
        # megatron's sequence mappings allocate on "the current device", which torch cannot name on a machine without CUDA
        torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=False)
    topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the topology
        grid = PipelineParallelGrid(topology=topology)
    mesh = Mesh(layout, rank(), parallel_state.get_tensor_model_parallel_group(), _stage_group(layout), grid)
    _compare("tensor", mesh, dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()), grid.slice_group)
    _compare("data", mesh, dist.get_process_group_ranks(parallel_state.get_data_parallel_group()), grid.dp_group)
    _compare("pipe", mesh, dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()), grid.pp_group)
    return mesh


def _stage_group(layout: Layout) -> dist.ProcessGroup:
    groups = layout.groups("data", "tensor")
    made = [dist.new_group(ranks) for ranks in groups]  # every rank makes every group
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank() in ranks)
    assert isinstance(own, dist.ProcessGroup)  # new_group answers a number to ranks outside
    return own


def _compare(axis: Axis, mesh: Mesh, megatron: list[int], deepspeed: list[int]) -> None:
    ours = next(group for group in mesh.layout.groups(axis) if mesh.rank in group)
    if not ours == list(megatron) == list(deepspeed):
        raise RuntimeError(
            f"The {axis} group of rank {mesh.rank} is {ours}, but megatron has {list(megatron)} and DeepSpeed {list(deepspeed)}: one of "
            f"them numbers ranks otherwise than the version this was written for."
        )
