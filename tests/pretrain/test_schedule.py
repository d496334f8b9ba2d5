"""The schedules at their ends and corners, and as properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.schedule import learning_rate_scale, progress, weight_decay_scale
from pretrain.sections import ScheduleSection

TOTAL = 1000


def test_trapezoid_is_flat_then_linear_to_final() -> None:
    schedule = ScheduleSection(shape="trapezoid", warmup=0.0, decay=0.5, final=0.0)
    assert [learning_rate_scale(t, schedule, TOTAL) for t in (0, 499, 500, 750, 1000)] == [1.0, 1.0, 1.0, 0.5, 0.0]
    raised = ScheduleSection(shape="trapezoid", decay=0.2, final=0.1)
    assert learning_rate_scale(900, raised, TOTAL) == pytest.approx(0.55)


def test_warmup_rises_from_zero_in_every_shape() -> None:
    for shape in ("trapezoid", "cosine", "constant"):
        schedule = ScheduleSection(shape=shape, warmup=0.1, decay=0.5)
        assert [learning_rate_scale(t, schedule, TOTAL) for t in (0, 50, 100)] == [0.0, 0.5, 1.0]


def test_cosine_is_half_way_in_the_middle() -> None:
    schedule = ScheduleSection(shape="cosine", warmup=0.2, final=0.1)
    assert learning_rate_scale(600, schedule, TOTAL) == pytest.approx(0.55)
    assert learning_rate_scale(1000, schedule, TOTAL) == pytest.approx(0.1)


def test_weight_decay_fades_linearly_to_zero() -> None:
    assert [weight_decay_scale(t, TOTAL) for t in (0, 250, 1000, 2000)] == [1.0, 0.75, 0.0, 0.0]


@given(
    st.sampled_from(["trapezoid", "cosine", "constant"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2 * TOTAL),
)
def test_scale_stays_between_zero_and_one(shape: str, warmup: float, decay: float, final: float, tokens: int) -> None:
    schedule = ScheduleSection.model_construct(shape=shape, warmup=warmup, decay=decay, final=final)
    scale = learning_rate_scale(tokens, schedule, TOTAL)
    assert math.isfinite(scale)
    assert 0.0 <= scale <= 1.0


@pytest.mark.parametrize(("done", "total"), [(-1, 10), (0, 0)])
def test_impossible_budgets_are_refused(done: int, total: int) -> None:
    with pytest.raises(ValueError, match="total_tokens"):
        progress(done, total)
