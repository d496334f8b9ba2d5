"""Muon's orthogonalisation against an exact polar factor and a re-implementation, and the cutting of matrices into pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain import muon
from pretrain.muon import (
    Matrix,
    MatrixPieces,
    Piece,
    apply_update,
    cut_contiguously,
    cut_each,
    momentum_mix,
    newton_schulz,
    on_every_shard,
    orthogonalised,
)

SHAPES = [(7, 7), (5, 13), (13, 5), (1, 9)]


def matrix_with_spectrum(rows: int, columns: int, spectrum: Tensor) -> Tensor:
    u, _ = torch.linalg.qr(torch.randn(rows, len(spectrum), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(spectrum), dtype=torch.float64))
    return u @ torch.diag(spectrum) @ v.T


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_newton_schulz_is_the_polynomial_of_the_singular_values(rows: int, columns: int) -> None:
    """An odd matrix polynomial keeps U and V and maps each singular value: an SVD gives the answer without any iteration."""
    torch.manual_seed(rows * columns)
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag(s) @ vh
    torch.testing.assert_close(newton_schulz(matrix[None], 5, torch.float64)[0], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(newton_schulz(matrix[None].float(), 5, torch.float32)[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 40), (40, 16)])
def test_singular_values_land_in_the_known_band(rows: int, columns: int) -> None:
    """UV^T within the band of the five steps: [0.65, 1.25] for singular values from 0.01 to 1 of a unit Frobenius norm."""
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -1.8, 16, dtype=torch.float64)
    result = newton_schulz(matrix_with_spectrum(rows, columns, spectrum)[None], 5, torch.float64)[0]
    values = torch.linalg.svdvals(result)[:16]
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_bf16_stays_near_fp32() -> None:
    """bf16 rounds each of the 15 products to 2^-9 and the polynomial amplifies it: some percent, which Muon is known to bear."""
    torch.manual_seed(0)
    matrix = matrix_with_spectrum(32, 32, torch.linspace(1, 0.2, 32, dtype=torch.float64))[None]
    exact, coarse = newton_schulz(matrix, 5, torch.float64)[0], newton_schulz(matrix.float(), 5, torch.bfloat16)[0]
    assert coarse.dtype == torch.bfloat16
    assert (coarse.double() - exact).norm() / exact.norm() < 0.1


def test_tall_matrices_are_scaled_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in [(13, 5), (5, 13), (13, 5), (13, 5)]]
    together = orthogonalised(matrices, 5, torch.float64)
    for matrix, result in zip(matrices, together, strict=True):
        factor = (13 / 5) ** 0.5 if matrix.shape[0] == 13 else 1.0
        torch.testing.assert_close(result, factor * newton_schulz(matrix[None], 5, torch.float64)[0])
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 2 * 13 * 5)
    for alone, result in zip(orthogonalised(matrices, 5, torch.float64), together, strict=True):
        torch.testing.assert_close(alone, result)


def test_momentum_is_nesterovs() -> None:
    gradients = torch.randn(3, 4, 5, dtype=torch.float64)
    buffer, m = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    for gradient in gradients:
        m = 0.9 * m + 0.1 * gradient
        torch.testing.assert_close(momentum_mix(gradient.clone(), buffer, 0.9), 0.9 * m + 0.1 * gradient)
        torch.testing.assert_close(buffer, m)


def test_decay_is_cautious() -> None:
    parameter = torch.tensor([2.0, 2.0, -2.0, -2.0])
    update = torch.tensor([1.0, -1.0, 1.0, -1.0])
    apply_update(parameter, update, lr=0.1, weight_decay=0.5)
    # Decay pulls towards 0; only the first and last update do so too.
    torch.testing.assert_close(parameter, torch.tensor([2.0 - 0.1 * (1 + 1), 2.1, -2.1, -(2.0 - 0.1 * (1 + 1))]))


SHARD_SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1)), min_size=1, max_size=6)


def of_shards(shards: list[tuple[int, int, int]], tensor: int) -> tuple[Matrix, ...]:
    """The matrices whose shards, over `tensor` ranks, are (rows, columns, dimension of the cut)."""
    return tuple(Matrix(r * tensor, c, 0, tensor) if dim == 0 else Matrix(r, c * tensor, 1, tensor) for r, c, dim in shards)


def lay_out(sizes: list[int], gap: int, data: int) -> tuple[list[int], int]:
    """Offsets of tensors that lie `gap` apart, and the partition of each of `data` ranks."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += size + gap
    return offsets, -(-end // data)


@settings(deadline=None)
@given(SHARD_SHAPES, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_cuts_cover_every_element_once(shards: list[tuple[int, int, int]], data: int, tensor: int, gap: int) -> None:
    sizes = [rows * columns for rows, columns, _ in shards]
    matrices = of_shards(shards, tensor)
    offsets, partition = lay_out(sizes, gap, data)
    for cut, joined in ((cut_contiguously(sizes, offsets, partition, data), True), (cut_each(sizes, data), False)):
        seen = [torch.zeros(matrix.size, dtype=torch.int) for matrix in matrices]
        pieces = on_every_shard(cut, matrices, tensor)
        assert len(pieces) == data * tensor
        for rank, own in enumerate(pieces):
            data_rank, tensor_rank = divmod(rank, tensor)
            for piece in own:
                seen[piece.matrix][piece.start : piece.stop] += 1
                assert tensor_rank * sizes[piece.matrix] <= piece.start < piece.stop <= (tensor_rank + 1) * sizes[piece.matrix]
                if joined:  # the piece lies where the flat buffer has it
                    start = piece.start - tensor_rank * sizes[piece.matrix]
                    assert data_rank * partition + piece.offset == offsets[piece.matrix] + start
                    assert piece.offset + piece.size <= partition
        assert all(bool((counts == 1).all()) for counts in seen)
        layout = MatrixPieces(matrices, pieces, 0, None)
        assert all(any(piece.matrix == matrix for piece in pieces[owner]) for matrix, owner in enumerate(layout.owners))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1), st.integers(1, 4))
def test_shards_one_after_the_other_are_the_whole_matrix(rows: int, columns: int, dim: int, tensor: int) -> None:
    (matrix,) = of_shards([(rows, columns, dim)], tensor)
    whole = torch.arange(matrix.size).view(matrix.rows, matrix.columns)
    flat = torch.cat([shard.reshape(-1) for shard in whole.chunk(tensor, dim)])
    assert torch.equal(matrix.join(flat), whole)
    assert torch.equal(matrix.split(whole), flat)
    assert torch.equal(matrix.split(whole.mT.contiguous().mT), flat)  # Newton-Schulz answers tall matrices as transposed views


class Stage:
    """The ranks of a stage as threads of this process: all_to_all_single by shared memory."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.sent: list[list[Tensor]] = [[] for _ in range(ranks)]
        self.rank = threading.local()

    def all_to_all_single(self, output: Tensor, sent: Tensor, output_sizes: list[int], sizes: list[int], group: object) -> None:
        self.sent[self.rank.value] = list(sent.split(sizes))
        self.barrier.wait()
        received = [parts[self.rank.value] for parts in self.sent]
        assert [part.numel() for part in received] == output_sizes
        output.copy_(torch.cat(received))
        self.barrier.wait()

    def run(self, rank: int, work: Callable[[int], Tensor]) -> Tensor:
        self.rank.value = rank
        return work(rank)


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2), (3, 2), (2, 1), (1, 4)])
@pytest.mark.parametrize("each", [False, True], ids=["joined", "each"])
def test_cut_over_a_stage_the_update_is_the_whole_one(data: int, tensor: int, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a stage, with all matrices in its flat partition, padding of NaN between them: as whole matrices on one rank."""
    torch.manual_seed(data * tensor)
    shards = [(5, 3, 0), (2, 7, 1), (4, 4, 1), (1, 6, 0)]
    matrices, sizes = of_shards(shards, tensor), [rows * columns for rows, columns, _ in shards]
    wholes = [torch.randn(matrix.rows, matrix.columns) for matrix in matrices]
    flats = [matrix.split(whole) for matrix, whole in zip(matrices, wholes, strict=True)]
    offsets, partition = lay_out(sizes, 3, data)
    pieces = on_every_shard(cut_each(sizes, data) if each else cut_contiguously(sizes, offsets, partition, data), matrices, tensor)
    stage = Stage(data * tensor)
    done: list[tuple[int, ...]] = []
    monkeypatch.setattr(muon.dist, "all_to_all_single", stage.all_to_all_single)

    def counted(own: list[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
        done.extend(tuple(matrix.shape) for matrix in own)
        return orthogonalised(own, steps, dtype)

    monkeypatch.setattr(muon, "orthogonalised", counted)

    def work(rank: int) -> Tensor:
        mix = torch.full((partition if not each else sum(-(-size // data) for size in sizes),), torch.nan)
        for piece in pieces[rank]:
            mix.narrow(0, piece.offset, piece.size).copy_(flats[piece.matrix][piece.start : piece.stop])
        return MatrixPieces(matrices, pieces, rank, None).update(mix, 5, torch.float32)

    with ThreadPoolExecutor(data * tensor) as pool:
        updates = list(pool.map(lambda rank: stage.run(rank, work), range(data * tensor)))
    found = [torch.full((matrix.size,), torch.nan) for matrix in matrices]
    for rank, update in enumerate(updates):
        for piece in pieces[rank]:
            found[piece.matrix][piece.start : piece.stop] = update.narrow(0, piece.offset, piece.size)
    for matrix, flat, expected in zip(matrices, found, orthogonalised(wholes, 5, torch.float32), strict=True):
        torch.testing.assert_close(matrix.join(flat), expected)
    assert sorted(done) == sorted(tuple(whole.shape) for whole in wholes), "a matrix was orthogonalised in parts, not at all, or twice"


def test_one_rank_needs_no_exchange() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(3, 5), torch.randn(4, 2)]
    flat = torch.cat([*(matrix.reshape(-1) for matrix in matrices), torch.full((3,), torch.nan)])
    layout = MatrixPieces((Matrix(3, 5), Matrix(4, 2)), cut_contiguously([15, 8], [0, 15], 26, 1), 0, None)
    update = layout.update(flat, 5, torch.float32)
    expected = orthogonalised(matrices, 5, torch.float32)
    torch.testing.assert_close(update, torch.cat([*(matrix.reshape(-1) for matrix in expected), torch.zeros(3)]))


def test_even_cuts_spread_the_work_over_data_and_tensor_ranks() -> None:
    matrices = (Matrix(8, 8, 1, 2),) * 8
    assert sorted(MatrixPieces(matrices, on_every_shard(cut_each([32] * 8, 2), matrices, 2), 0, None).owners) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "runs", [[(0, 12)], [(0, 12), (8, 16)], [(0, 8), (8, 16), (0, 8)], [(0, 8), (9, 16)], [(0, 8), (12, 16), (8, 12), (4, 8)]]
)
def test_missing_and_doubled_elements_are_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="cover every matrix"):
        MatrixPieces((Matrix(4, 4),), (tuple(Piece(0, start, stop, start) for start, stop in runs),), 0, None)
