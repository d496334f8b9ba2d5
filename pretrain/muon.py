"""Muon's mathematics: orthogonalised momentum, for whole matrices and for matrices cut across ranks.

    m <- beta m + (1 - beta) g            momentum, kept wherever the gradient is kept
    d  = beta m + (1 - beta) g            Nesterov's look-ahead
    u  = sqrt(max(1, rows / cols)) NS(d)  with NS(d) near U V^T for d = U S V^T
    p <- p - lr (u + decay [u p > 0] p)   decay only where it pulls the way the update does ("cautious")

NS is five steps of the odd quintic X <- a X + (b G + c G G) X, G = X X^T, from X = d / ||d||_F. Its coefficients are
chosen for a steep slope at 0 rather than for convergence to 1: singular values above a few 1e-3 (of a unit Frobenius
norm) land between about 0.7 and 1.2, smaller ones stay below (slope 3.4445^5, about 485, at 0). Source of the iteration,
its coefficients and the shape factor: Keller Jordan, "Muon" (2024), as used by nanochat and the published Attractor
code; cautious decay: arXiv 2411.16085.

Under ZeRO a rank holds a run of elements that may start and end inside a matrix. `MatrixPieces` says which elements of
which matrix every rank holds; one all-to-all brings each matrix whole to the one rank that owns it, and a second brings
every rank its elements of the result. State stays sharded, each matrix is orthogonalised once, and a rank sends and
receives at most about its own partition twice, whatever the number of ranks.

Under tensor parallelism a matrix is cut into T equal shards first, along its rows or its columns, and each shard then over
the data ranks. Its elements are numbered shard by shard: tensor rank t holds some of t * size / T ... (t + 1) * size / T. So
a cut matrix is only a matrix with more holders; the dimension of the cut matters to its owner alone, which joins the shards
before it orthogonalises and splits the result after. The ranks that exchange are data x tensor of one pipeline stage.
Axes: r rows, c columns, k matrices of one shape. Refuses: anything but matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of the Newton-Schulz step."""

BATCH_ELEMENTS = 1 << 26
"""Most elements orthogonalised in one batched product: bounds the workspace (about 5 such tensors), not the result."""


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal factors [k, r, c] of `matrices` [k, r, c], computed and returned in `dtype`."""
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.to(dtype) if wide else matrices.to(dtype).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _batches(shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
    """Indices of equal shapes, in bounded batches."""
    alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        alike[shape].append(index)
    for shape, indices in alike.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def orthogonalised(matrices: Sequence[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """sqrt(max(1, r / c)) NS(matrix) of each [r, c], in their order and in `dtype`. Equal shapes share batched products."""
    result: list[Tensor] = list(matrices)
    for batch in _batches([matrix.shape for matrix in matrices]):
        rows, columns = matrices[batch[0]].shape
        stacked = newton_schulz(torch.stack([matrices[index] for index in batch]), steps, dtype)
        stacked = stacked * max(1.0, rows / columns) ** 0.5
        for index, matrix in zip(batch, stacked.unbind(), strict=True):
            result[index] = matrix
    return result


def momentum_mix(gradient: Tensor, momentum_buffer: Tensor, momentum: float) -> Tensor:
    """Updates `momentum_buffer` in place and returns Nesterov's mix, in the storage of `gradient`, which is used up."""
    momentum_buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp_(momentum_buffer, momentum)


def apply_update(parameter: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """p <- p - lr (u + weight_decay [u p > 0] p), elementwise, in place; any shape, `update` in any float dtype."""
    step = update.to(parameter.dtype)
    if weight_decay != 0:
        step = step.addcmul(parameter, (step * parameter > 0).to(step.dtype), value=weight_decay)
    parameter.add_(step, alpha=-lr)


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns], held flat as `shards` equal parts cut along `dim`: one part after the other, each row-major."""

    rows: int
    columns: int
    dim: int = 0
    shards: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def join(self, flat: Tensor) -> Tensor:
        """[rows, columns] from its flat elements [size]. Parts cut along the rows already lie row-major."""
        if self.dim == 0:
            return flat.view(self.rows, self.columns)
        return flat.view(self.shards, self.rows, -1).movedim(0, 1).reshape(self.rows, self.columns)

    def split(self, whole: Tensor) -> Tensor:
        """The inverse of `join`."""
        if self.dim == 0:
            return whole.reshape(-1)
        return whole.reshape(self.rows, self.shards, -1).movedim(1, 0).reshape(-1)


@dataclass(frozen=True)
class Piece:
    """Elements start:stop of matrix number `matrix`, in its flat order, which lie at `offset` of the holder's flat partition."""

    matrix: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _owners(pieces: Sequence[Sequence[Piece]], matrices: Sequence[Matrix]) -> list[int]:
    """The rank that orthogonalises each matrix: of those that hold at least half as much of it as any, the least loaded.

    Whole or mostly local matrices thus stay (ZeRO 1 and 2), evenly cut ones (ZeRO 3, tensor ranks) are spread by their cost.
    """
    held = [[0] * len(pieces) for _ in matrices]
    for rank, own in enumerate(pieces):
        for piece in own:
            held[piece.matrix][rank] += piece.size
    cost = [matrix.size * min(matrix.rows, matrix.columns) for matrix in matrices]
    load = [0] * len(pieces)
    owners = [0] * len(matrices)
    for matrix in sorted(range(len(matrices)), key=lambda index: -cost[index]):
        candidates = [rank for rank, count in enumerate(held[matrix]) if 2 * count >= max(held[matrix])]
        owners[matrix] = min(candidates, key=lambda rank: load[rank])
        load[owners[matrix]] += cost[matrix]
    return owners


@dataclass(frozen=True)
class MatrixPieces:
    """How `matrices` are cut over the ranks of `group`: pieces[rank] lists what lies in that rank's flat partition."""

    matrices: tuple[Matrix, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    rank: int
    group: dist.ProcessGroup | None
    owners: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        reached, seamless = [0] * len(self.matrices), True
        for matrix, start, stop in sorted((piece.matrix, piece.start, piece.stop) for own in self.pieces for piece in own):
            seamless &= start == reached[matrix]
            reached[matrix] = stop
        if not seamless or reached != [matrix.size for matrix in self.matrices]:
            raise ValueError("The pieces of the ranks do not cover every matrix exactly once.")
        object.__setattr__(self, "owners", tuple(_owners(self.pieces, self.matrices)))

    def update(self, mix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        """Orthogonalised updates of this rank's partition [n], in `dtype`, from its momentum mix [n]. Collective over `group`."""
        outgoing = [self._between(self.rank, owner) for owner in range(len(self.pieces))]
        incoming = [self._between(holder, self.rank) for holder in range(len(self.pieces))]
        own = self._gather(mix, outgoing, incoming, dtype)
        results = orthogonalised([self.matrices[matrix].join(flat) for matrix, flat in own.items()], steps, dtype)
        own = {matrix: self.matrices[matrix].split(result) for matrix, result in zip(own, results, strict=True)}
        return self._scatter(own, outgoing, incoming, torch.zeros(mix.numel(), dtype=dtype, device=mix.device))

    def _between(self, holder: int, owner: int) -> list[Piece]:
        return [piece for piece in self.pieces[holder] if self.owners[piece.matrix] == owner]

    def _exchange(self, sent: list[Tensor], like: Tensor, send: list[list[Piece]], receive: list[list[Piece]]) -> list[Tensor]:
        """One all-to-all: `sent` holds the pieces of `send` in their order; comes back as the pieces of `receive`."""
        send_sizes = [sum(piece.size for piece in pieces) for pieces in send]
        receive_sizes = [sum(piece.size for piece in pieces) for pieces in receive]
        packed = torch.cat(sent) if sent else like.new_empty(0)
        received = packed
        if len(self.pieces) > 1:
            received = like.new_empty(sum(receive_sizes))
            dist.all_to_all_single(received, packed, receive_sizes, send_sizes, group=self.group)
        sizes = [piece.size for pieces in receive for piece in pieces]
        return list(received.split(sizes)) if sizes else []

    def _gather(self, mix: Tensor, outgoing: list[list[Piece]], incoming: list[list[Piece]], dtype: torch.dtype) -> dict[int, Tensor]:
        """All elements of the matrices this rank owns, flat."""
        mix = mix.to(dtype)
        sent = [mix.narrow(0, piece.offset, piece.size) for pieces in outgoing for piece in pieces]
        received = self._exchange(sent, mix, outgoing, incoming)
        own = {matrix: mix.new_empty(self.matrices[matrix].size) for matrix, owner in enumerate(self.owners) if owner == self.rank}
        for piece, values in zip((piece for pieces in incoming for piece in pieces), received, strict=True):
            own[piece.matrix][piece.start : piece.stop] = values
        return own

    def _scatter(self, own: dict[int, Tensor], outgoing: list[list[Piece]], incoming: list[list[Piece]], out: Tensor) -> Tensor:
        """This rank's elements of every owner's flat results, in `out`; padding stays zero."""
        sent = [own[piece.matrix][piece.start : piece.stop] for pieces in incoming for piece in pieces]
        received = self._exchange(sent, out, incoming, outgoing)
        for piece, values in zip((piece for pieces in outgoing for piece in pieces), received, strict=True):
            out.narrow(0, piece.offset, piece.size).copy_(values)
        return out


def cut_contiguously(sizes: Sequence[int], offsets: Sequence[int], partition: int, ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces when matrices of `sizes` elements lie at `offsets` of one flat buffer cut into `ranks` runs of `partition`."""
    result = []
    for rank in range(ranks):
        low, high = rank * partition, (rank + 1) * partition
        spans = [(max(low, offset) - offset, min(high, offset + size) - offset) for size, offset in zip(sizes, offsets, strict=True)]
        result.append(
            tuple(Piece(matrix, start, stop, offsets[matrix] + start - low) for matrix, (start, stop) in enumerate(spans) if start < stop)
        )
    return tuple(result)


def cut_each(sizes: Sequence[int], ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces when each matrix by itself is cut into `ranks` equal runs, the last one padded, and a rank's runs are joined."""
    runs = [-(-size // ranks) for size in sizes]
    offsets = [0, *accumulate(runs)]
    return tuple(
        tuple(
            Piece(matrix, rank * run, min(size, (rank + 1) * run), offsets[matrix])
            for matrix, (size, run) in enumerate(zip(sizes, runs, strict=True))
            if rank * run < size
        )
        for rank in range(ranks)
    )


def on_every_shard(cut: Sequence[Sequence[Piece]], matrices: Sequence[Matrix], shards: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of data x tensor ranks, tensor fastest, when `cut` says how data ranks share one shard, the same on every tensor rank."""
    result = []
    for own in cut:
        for shard in range(shards):
            first = [shard * (matrix.size // shards) for matrix in matrices]
            result.append(tuple(replace(p, start=first[p.matrix] + p.start, stop=first[p.matrix] + p.stop) for p in own))
    return tuple(result)
