"""Tensor parallelism behind the `Layers` seam, by megatron.core.tensor_parallel: heads, MLP channels and vocabulary over T ranks.

    column   W [out, in] cut by rows: no communication; its input came through `enter`
    row      W [out, in] cut by columns: each rank has a summand of the output, added up on the way out
    table    [v, w] cut by rows: rows that are elsewhere are zero, added up on the way out

Between matrices activations are replicated [b, s, w], or, divided, this rank's tokens [b, s / T, w]:

                 replicated                         divided
    enter        identity; backward all-reduce      all-gather; backward reduce-scatter
    leave        all-reduce; backward identity      reduce-scatter; backward all-gather

An all-reduce is a reduce-scatter and an all-gather, so both carry the same bytes: per block twice w bytes-per-value a token, forward,
and as much backward. Query, key and value (gate and up) read one `enter`, so that backward reduces once for all of them. The
attractor is always divided: its state, residuals and history shrink with T, at the cost of one all-gather a micro-batch in backward.

The matrices are plain nn.Linear over megatron's mappings, not its ColumnParallelLinear: that computes a weight's gradient in every
backward, also in the vector-Jacobian products of an adjoint solve, which ask for none.
Megatron's mappings cut the first dimension, and reduce a tensor in place if it is contiguous and not at all (!) if it is not: here they
are handed contiguous tensors that nobody else reads. Of a gradient nobody can promise that, so `_Copied` is our own.
Shapes: b batch, s sequence, w width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, tensor_parallel
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from model import loss
from model.fixed_point import UNDIVIDED, Tokens
from model.layers import Layers


class _Group:
    """Reductions over the tensor ranks. Their argument is used up."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    def total(self, x: Tensor) -> Tensor:
        return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), self.group)

    def highest(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x


class DividedTokens(_Group):
    """Rank t has positions t s / T ... (t + 1) s / T of every sequence: model.fixed_point.Tokens."""

    def whole(self, x: Tensor) -> Tensor:
        parts = x.new_empty((self.ranks * x.shape[0], x.shape[1]))
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        return torch.cat(parts.chunk(self.ranks), dim=1)

    def own(self, x: Tensor) -> Tensor:
        return x.chunk(self.ranks, dim=1)[self.rank]


class TensorParallelLayers:
    """Layers of one tensor rank. divided: tokens are divided between matrices (sequence parallelism)."""

    def __init__(self, group: dist.ProcessGroup, divided: bool) -> None:
        self.group, self.is_divided = group, divided
        self.ranks, self.rank = group.size(), group.rank()
        self.tokens: Tokens = DividedTokens(group) if divided else UNDIVIDED
        self.rows = _Group(group)

    # --- matrices

    def column(self, inputs: int, outputs: int) -> nn.Module:
        return _marked(nn.Linear(inputs, outputs // self.ranks, bias=False), 0)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        return _marked(_Row(inputs // self.ranks, outputs, self), 1)

    def replicated(self, inputs: int, outputs: int) -> nn.Module:
        return _Shared(inputs, outputs, self)

    def embedding(self, rows: int, width: int) -> nn.Module:
        return _marked(_Embedding(rows, width, self), 0)

    def value_embedding(self, rows: int, width: int) -> nn.Module:
        return _marked(nn.Embedding(rows, width // self.ranks), 1)

    def local_heads(self, heads: int) -> int:
        return heads // self.ranks

    # --- activations

    def enter(self, x: Tensor) -> Tensor:
        if not self.is_divided:
            return _Copied.apply(x, self.group)
        parts = mappings.gather_from_sequence_parallel_region(x.contiguous(), group=self.group)  # [T b, s / T, w]
        return parts.unflatten(0, (self.ranks, -1)).transpose(0, 1).flatten(1, 2)

    def leave(self, x: Tensor) -> Tensor:
        """Summands of all tokens [b, s, w], used up -> the sum, at this rank's tokens."""
        if not self.is_divided:
            return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), self.group)
        return mappings.reduce_scatter_to_sequence_parallel_region(self._token_major(x), group=self.group)

    def shared(self, parameter: Tensor) -> Tensor:
        return _Copied.apply(parameter, self.group) if self.is_divided else parameter

    def divided(self) -> Layers:
        return self if self.is_divided else TensorParallelLayers(self.group, divided=True)

    def divide(self, x: Tensor) -> Tensor:
        return x if self.is_divided else mappings.scatter_to_sequence_parallel_region(self._token_major(x), self.group)

    def _token_major(self, x: Tensor) -> Tensor:
        """[b, s, w] -> [T b, s / T, w]: each rank's tokens together, in one copy (none for one sequence)."""
        return x.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()

    # --- parameters

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        sizes = list(parameter.shape)
        if is_sharded(parameter):
            sizes[partition_dim(parameter)] *= self.ranks
        return torch.Size(sizes)

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:
        return whole.chunk(self.ranks, partition_dim(parameter))[self.rank] if is_sharded(parameter) else whole

    # --- loss

    def cross_entropy_sum(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return loss.cross_entropy_sum(hidden, weight, targets, self.rows)

    def cross_entropy_tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return loss.cross_entropy_tokens(hidden, weight, targets, self.rows)


class _Copied(torch.autograd.Function):
    """What all ranks hold alike and use differently: the identity, whose gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Row(nn.Linear):
    def __init__(self, inputs: int, outputs: int, layers: TensorParallelLayers) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.leave(super().forward(x))


class _Shared(nn.Linear):
    def __init__(self, inputs: int, outputs: int, layers: TensorParallelLayers) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layers.shared(self.weight))


class _Embedding(tensor_parallel.VocabParallelEmbedding):
    """Rows of the vocabulary on this rank; [b, s] -> this rank's tokens."""

    def __init__(self, rows: int, width: int, layers: TensorParallelLayers) -> None:
        config = ModelParallelConfig(
            tensor_model_parallel_size=layers.ranks,
            use_cpu_initialization=True,  # allocates on the device of the context, which may be meta
            perform_initialization=False,
            params_dtype=torch.get_default_dtype(),
        )
        super().__init__(
            rows,
            width,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=layers.is_divided,
            config=config,
            tp_group=layers.group,
        )
        self.is_divided = layers.is_divided

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = super().forward(tokens)
        return embedded.transpose(0, 1).contiguous() if self.is_divided else embedded  # it comes sequence first when scattered


def is_sharded(parameter: Tensor) -> bool:
    """Whether this is one tensor rank's part of a matrix."""
    return getattr(parameter, "tensor_model_parallel", False)


def partition_dim(parameter: Tensor) -> int:
    """The dimension of a sharded parameter that is cut into equal, contiguous parts by tensor rank."""
    return parameter.partition_dim  # type: ignore[attr-defined]


def _marked(module: nn.Module, dimension: int) -> nn.Module:
    """The module, its weight marked as DeepSpeed's gradient norm and megatron know shards."""
    weight = module.get_parameter("weight")
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dimension, 1  # type: ignore[attr-defined]
    return module
