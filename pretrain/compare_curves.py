"""Losses over training: smoothed over equal windows of tokens, and where one curve first comes down to a loss.

    smoothed(t) = mean of the losses recorded in (t - W, t],   W the same number of tokens for every run
    reach(L)    = the first point where the curve, straight between its records, is at or below L

W is 1/20 of the shortest run, or as many tokens as hold `RECORDS` records of the run that recorded most rarely, if that is more; never
more than 1/5 of the shortest run. Points before W have no whole window and are left out. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.compare_records import AXES, Curve

LEAST, MOST = 1 / 20, 1 / 5
RECORDS = 10


def window_tokens(curves: Sequence[Curve]) -> float:
    """W for these training curves."""
    shortest = min(float(curve.tokens[-1]) for curve in curves)
    rarest = max(float(curve.tokens[-1]) / len(curve.tokens) for curve in curves)
    return min(MOST * shortest, max(LEAST * shortest, RECORDS * rarest))


def in_window(tokens: NDArray, window: float) -> NDArray[np.int64]:
    """For each point, the index of the first one in its window (t - W, t]."""
    return np.searchsorted(tokens, tokens - window, side="right")


def smoothed(curve: Curve, window: float) -> Curve:
    """The curve's means over windows of `window` tokens; at least its last point."""
    first, sums = in_window(curve.tokens, window), np.concatenate([[0.0], np.cumsum(curve.loss)])
    after = np.arange(1, len(curve.loss) + 1)
    means = (sums[after] - sums[first]) / (after - first)
    whole = curve.tokens >= window
    return Curve(curve.tokens[whole], curve.flops[whole], curve.seconds[whole], means[whole])


def reach(curve: Curve, loss: float) -> dict[str, Any] | None:
    """Tokens, FLOPs and seconds at which the curve is first at or below `loss`, and `earlier`: it was there before its first record.

    None where it never is.
    """
    below = np.flatnonzero(curve.loss <= loss)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return {**curve.spent(0), "earlier": bool(curve.loss[0] < loss)}
    share = (curve.loss[at - 1] - loss) / (curve.loss[at - 1] - curve.loss[at])
    before, after = curve.spent(at - 1), curve.spent(at)
    return {**{axis: before[axis] + float(share) * (after[axis] - before[axis]) for axis in AXES}, "earlier": False}


def crossing(curve: Curve, other: Curve) -> dict[str, Any]:
    """Where `curve` reaches the final loss of `other`, and that over what `other` had spent there. Both hold at least one point."""
    target = float(other.loss[-1])
    reached, spent = reach(curve, target), other.spent(-1)
    found: dict[str, Any] = {"loss": target, "reached": reached is not None, "earlier": bool(reached and reached["earlier"])}
    for axis in AXES:
        found[axis] = reached[axis] if reached else None
    found["ratios"] = {axis: reached[axis] / spent[axis] for axis in AXES} if reached else None
    return found
