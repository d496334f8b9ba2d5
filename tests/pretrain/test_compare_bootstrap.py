"""The paired bootstrap against the normal approximation of a ratio of sums, whose standard error has a closed form."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain import compare_bootstrap
from pretrain.compare_bootstrap import intervals, resampled_losses


def documents(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """nll [2, D] of two runs, tokens [D]: documents differ a lot in length and difficulty, the runs by 0.05 nats and a little noise."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 400, count)
    hard = generator.normal(4.0, 0.8, count)
    other = hard + 0.05 + generator.normal(0.0, 0.1, count)
    return np.stack([tokens * hard, tokens * other]), tokens


def test_interval_is_that_of_the_normal_approximation() -> None:
    nll, tokens = documents(1500)
    losses = nll.sum(axis=1) / tokens.sum()
    (pair,) = intervals(losses, resampled_losses(nll, tokens))
    difference = float(losses[1] - losses[0])
    rest = (nll[1] - nll[0]) - difference * tokens
    error = float(np.sqrt((rest**2).sum()) / tokens.sum())
    assert (pair["run"], pair["minus"]) == (1, 0)
    assert pair["difference"] == pytest.approx(difference, rel=1e-12)
    assert pair["low"] == pytest.approx(difference - 1.96 * error, abs=0.1 * error)
    assert pair["high"] == pytest.approx(difference + 1.96 * error, abs=0.1 * error)


def test_pairing_takes_out_what_documents_have_in_common() -> None:
    nll, tokens = documents(400)
    resampled = resampled_losses(nll, tokens, resamples=2000)
    paired = np.std(resampled[:, 1] - resampled[:, 0])
    apart = np.sqrt(np.var(resampled[:, 0]) + np.var(resampled[:, 1]))
    assert paired < 0.2 * apart


def test_a_difference_that_is_the_same_for_every_token_has_no_width() -> None:
    nll, tokens = documents(50)
    shifted = np.stack([nll[0], nll[0] + 0.125 * tokens])
    (pair,) = intervals(shifted.sum(axis=1) / tokens.sum(), resampled_losses(shifted, tokens, resamples=500))
    assert [pair["difference"], pair["low"], pair["high"]] == pytest.approx([0.125] * 3, rel=1e-9)


def test_seeded_and_the_same_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    nll, tokens = documents(30)
    whole = resampled_losses(nll, tokens, resamples=200, seed=3)
    monkeypatch.setattr(compare_bootstrap, "_CELLS", 7 * 30)
    told: list[float] = []
    assert np.allclose(resampled_losses(nll, tokens, resamples=200, seed=3, progress=told.append), whole, rtol=1e-12)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert not np.allclose(resampled_losses(nll, tokens, resamples=200, seed=4), whole)


def test_every_pair_of_three() -> None:
    nll, tokens = documents(20)
    three = np.concatenate([nll, nll[:1]])
    pairs = intervals(three.sum(axis=1) / tokens.sum(), resampled_losses(three, tokens, resamples=50))
    assert [(pair["run"], pair["minus"]) for pair in pairs] == [(1, 0), (2, 0), (2, 1)]
    assert pairs[1]["low"] == pairs[1]["high"] == 0.0
