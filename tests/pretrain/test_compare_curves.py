"""Crossings and smoothing against closed forms and against a plain reading of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.compare_curves import crossing, reach, smoothed, window_tokens
from pretrain.compare_records import Curve


def curve(tokens: list[float], loss: list[float], flops_a_token: float = 7.0, seconds_a_token: float = 0.25) -> Curve:
    at = np.array(tokens, float)
    return Curve(at, at * flops_a_token, at * seconds_a_token, np.array(loss, float))


def test_reach_lies_on_the_straight_line_between_records() -> None:
    found = reach(curve([100, 250, 400], [5.0, 4.0, 3.5]), 4.3)
    assert found is not None
    assert found["tokens"] == pytest.approx(100 + 0.7 * 150, rel=1e-12)
    assert found["flops"] == pytest.approx(7 * 205, rel=1e-12)
    assert found["seconds"] == pytest.approx(205 / 4, rel=1e-12)
    assert not found["earlier"]


def test_costs_that_are_not_in_proportion_are_interpolated_each() -> None:
    bent = Curve(np.array([1.0, 2.0]), np.array([10.0, 50.0]), np.array([3.0, 4.0]), np.array([2.0, 1.0]))
    assert reach(bent, 1.25) == {"tokens": 1.75, "flops": 40.0, "seconds": 3.75, "earlier": False}


def test_the_first_time_counts_and_never_is_none() -> None:
    wavy = curve([1, 2, 3, 4, 5], [5.0, 3.0, 4.0, 2.9, 4.5])
    found = reach(wavy, 3.5)
    assert found is not None
    assert found["tokens"] == 1.75
    assert reach(wavy, 2.8) is None


def test_a_record_at_the_loss_is_a_crossing_and_one_below_it_is_earlier() -> None:
    falling = curve([10, 20, 30], [5.0, 4.0, 3.0])
    exact, below, later = reach(falling, 5.0), reach(falling, 5.5), reach(falling, 4.0)
    assert exact is not None
    assert below is not None
    assert later is not None
    assert (exact["tokens"], exact["earlier"]) == (10.0, False)
    assert (below["tokens"], below["earlier"]) == (10.0, True)
    assert later["tokens"] == 20.0


@given(st.lists(st.floats(0.5, 8.0), min_size=2, max_size=20), st.floats(0.5, 8.0))
def test_the_curve_is_above_before_it_and_at_it_there(losses: list[float], target: float) -> None:
    told = curve([float(10 * (at + 1)) for at in range(len(losses))], losses)
    found = reach(told, target)
    if found is None:
        assert min(losses) > target
    else:
        before = told.tokens < found["tokens"] - 1e-6
        assert np.all(told.loss[before] > target)
        at = float(np.interp(found["tokens"], told.tokens, told.loss))
        assert found["earlier"] or at == pytest.approx(target, abs=1e-6)


def test_a_crossing_is_told_over_what_the_other_spent() -> None:
    fast = curve([0, 1000], [6.0, 2.0], flops_a_token=3.0, seconds_a_token=2.0)
    slow = curve([0, 1000], [6.0, 4.0], flops_a_token=1.0, seconds_a_token=1.0)
    found = crossing(fast, slow)
    assert found["loss"] == 4.0
    assert found["ratios"] == pytest.approx({"tokens": 0.5, "flops": 1.5, "seconds": 1.0}, rel=1e-12)
    assert crossing(slow, fast) == {
        "loss": 2.0,
        "reached": False,
        "earlier": False,
        "tokens": None,
        "flops": None,
        "seconds": None,
        "ratios": None,
    }


def test_windows_hold_equal_tokens_however_often_a_run_records() -> None:
    often = curve(list(range(10, 1001, 10)), list(np.linspace(5.0, 3.0, 100)))
    rarely = curve(list(range(50, 2001, 50)), list(np.linspace(5.0, 3.0, 40)))
    assert window_tokens([often, rarely]) == 200, "ten records of the rare one would be 500: more than a fifth of the shorter run"
    assert window_tokens([often, often]) == 100, "ten records"
    assert window_tokens([curve(list(range(1, 1001)), [1.0] * 1000)] * 2) == 50, "a twentieth"
    for told in (often, rarely):
        smooth = smoothed(told, 200.0)
        assert smooth.tokens[0] == 200
        for at, mean, flops in zip(smooth.tokens, smooth.loss, smooth.flops, strict=True):
            inside = (told.tokens > at - 200) & (told.tokens <= at)
            assert inside.sum() == 200 / (told.tokens[1] - told.tokens[0])
            assert mean == pytest.approx(told.loss[inside].mean(), rel=1e-12)
            assert flops == at * 7


def test_smoothing_a_line_lags_it_by_half_a_window() -> None:
    line = curve(list(range(1, 101)), [10 - 0.05 * at for at in range(1, 101)])
    smooth = smoothed(line, 20.0)
    assert smooth.loss == pytest.approx(10 - 0.05 * (smooth.tokens - 9.5), rel=1e-12)


def test_the_last_point_is_always_there() -> None:
    alone = curve([64], [4.0])
    assert smoothed(alone, window_tokens([alone, alone])).loss.tolist() == [4.0]
