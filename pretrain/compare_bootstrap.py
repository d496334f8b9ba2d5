"""Intervals of differences of loss by a paired bootstrap over documents. Pure numpy.

    loss of run k in a resample w:  L_k(w) = sum_d w_d nll[k, d] / sum_d w_d tokens[d],    w ~ Multinomial(D, 1/D)

All runs see the same resamples, so what documents have in common (some are hard for every model) leaves the difference. A document is
the unit because its tokens are not independent. The interval is the central one of the resampled differences (percentiles). It
holds what another draw of documents might change, and nothing of what another seed of training might; below some 30 documents it is
too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
_CELLS = 4_000_000  # of a chunk: 32 MB of counts


def resampled_losses(
    nll: NDArray[np.float64],
    tokens: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    progress: Callable[[float], None] | None = None,
) -> NDArray[np.float64]:
    """Losses in nats a token [resamples, K] of K runs. nll: summed over each document [K, D]; tokens: predicted in each [D], positive."""
    documents = len(tokens)
    generator, chances = np.random.default_rng(seed), np.full(documents, 1.0 / documents)
    chunk, found = max(1, _CELLS // documents), []
    for start in range(0, resamples, chunk):
        counts = generator.multinomial(documents, chances, size=min(chunk, resamples - start)).astype(np.float64)
        found.append((counts @ nll.T) / (counts @ tokens)[:, None])
        if progress is not None:
            progress(min(1.0, (start + chunk) / resamples))
    return np.concatenate(found)


def intervals(losses: NDArray[np.float64], resampled: NDArray[np.float64], level: float = LEVEL) -> list[dict[str, Any]]:
    """For every pair i < j: difference L_j - L_i of the losses [K], and its interval by the resampled losses [R, K]."""
    tails = [50 * (1 - level), 50 * (1 + level)]
    pairs = []
    for i, j in combinations(range(len(losses)), 2):
        low, high = np.percentile(resampled[:, j] - resampled[:, i], tails)
        pairs.append({"run": j, "minus": i, "difference": float(losses[j] - losses[i]), "low": float(low), "high": float(high)})
    return pairs
