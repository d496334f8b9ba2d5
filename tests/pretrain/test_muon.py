"""Muon's orthogonalisation against an exact polar factor and a re-implementation, and the cutting of matrices into pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain import muon
from pretrain.muon import MatrixPieces, apply_update, cut_contiguously, cut_each, momentum_mix, newton_schulz, orthogonalised

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


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 3))
def test_cuts_cover_every_element_once(shapes: list[tuple[int, int]], ranks: int, gap: int) -> None:
    sizes = [rows * columns for rows, columns in shapes]
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += size + gap
    partition = -(-end // ranks)
    whole = torch.arange(partition * ranks)
    for cut, per_matrix in ((cut_contiguously(sizes, offsets, partition, ranks), False), (cut_each(sizes, ranks), True)):
        seen = [torch.zeros(size, dtype=torch.int) for size in sizes]
        for rank, own in enumerate(cut):
            for piece in own:
                seen[piece.matrix][piece.start : piece.stop] += 1
                if not per_matrix:  # the piece lies where the flat buffer has it
                    flat = whole[rank * partition : (rank + 1) * partition][piece.offset : piece.offset + piece.size]
                    wanted = torch.arange(piece.start, piece.stop) + offsets[piece.matrix]
                    assert torch.equal(flat, wanted)
        assert all(bool((counts == 1).all()) for counts in seen)
        layout = MatrixPieces(tuple(shapes), cut, 0, None)
        assert all(any(piece.matrix == matrix for piece in cut[owner]) for matrix, owner in enumerate(layout.owners))


def test_one_rank_needs_no_exchange() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(3, 5), torch.randn(4, 2)]
    flat = torch.cat([*(matrix.reshape(-1) for matrix in matrices), torch.full((3,), torch.nan)])
    layout = MatrixPieces(((3, 5), (4, 2)), cut_contiguously([15, 8], [0, 15], 26, 1), 0, None)
    update = layout.update(flat, 5, torch.float32)
    expected = orthogonalised(matrices, 5, torch.float32)
    torch.testing.assert_close(update, torch.cat([*(matrix.reshape(-1) for matrix in expected), torch.zeros(3)]))


def test_even_cuts_spread_the_work() -> None:
    layout = MatrixPieces(((8, 8),) * 8, cut_each([64] * 8, 4), 0, None)
    assert sorted(layout.owners) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_missing_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="cover every matrix"):
        MatrixPieces(((4, 4),), cut_contiguously([12], [0], 12, 1), 0, None)
