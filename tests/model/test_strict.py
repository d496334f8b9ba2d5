"""The strict solve: frozen in order, patient by token, blind to padding, later tokens and the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import SolverConfig
from model.fixed_point import Map, token_residual
from model.language_model import LanguageModel
from model.strict import solve_strict
from tests.model.support import map_and_start, random_tokens
from tests.model.test_fixed_point import WIDTH, coupled, normal


def staged(residuals: list[list[float]]) -> tuple[Map, list[Tensor]]:
    """A map whose token t changes by residuals[t][k] of itself at evaluation k (the last for ever), and its values one by one."""
    values: list[Tensor] = []

    def f(y: Tensor) -> Tensor:
        rates = torch.tensor([of[min(len(values), len(of) - 1)] for of in residuals], dtype=y.dtype)
        values.append(y + rates[None, :, None] * y)
        return values[-1]

    return f, values


def test_strict_freezes_a_token_once_all_before_it_are_done() -> None:
    # the map couples nothing, so a token's own convergence is known: rates that fall with position must wait, others must not
    rates = torch.tensor([0.5, 0.1, 0.8, 0.2], dtype=torch.float64)[None, :, None]
    f = lambda y: rates * y + 1  # noqa: E731
    tolerance = 1e-4
    config = SolverConfig(method="picard", tolerance=tolerance, max_iterations=200)
    start = normal(3, (1, 4, WIDTH)) + 10
    solution = solve_strict(f, start, config)
    y, history = start, []
    for _ in range(200):
        history.append((f(y), token_residual(f(y) - y, y)[0]))
        y = f(y)
    done_at = 0
    for position in range(4):
        done_at = next(k for k in range(done_at, 200) if history[k][1][position] < tolerance)
        assert torch.equal(solution.state[:, position], history[done_at][0][:, position])
    assert int(solution.iterations) == done_at + 1
    assert bool(solution.converged.all())


def test_strict_does_not_leak_whatever_the_mixing() -> None:
    start, changed = normal(3), normal(3)
    changed[:, 3:] = normal(8)[:, 3:]
    for mixing in ("token", "sequence"):
        config = SolverConfig(mixing=mixing, history=2, tolerance=1e-3)
        one, other = solve_strict(coupled, start, config), solve_strict(coupled, changed, config)
        assert torch.equal(one.state[:, :3], other.state[:, :3]), mixing


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_token_that_stalls_keeps_its_best_value_and_lets_the_others_go_on(patience: int) -> None:
    # token 0 bottoms out at the second evaluation, token 1 converges at the fifth, token 2 bottoms out at the third: it waits for 1
    f, values = staged([[1.0, 0.1, 0.2], [1.0, 0.5, 0.3, 0.1, 0.0], [1.0, 0.9, 0.05, 0.2, 0.06]])
    config = SolverConfig(method="picard", tolerance=1e-3, patience=patience, max_iterations=50)
    solution = solve_strict(f, normal(3, (1, 3, WIDTH)), config)
    ends = max(2 + patience, 5, 3 + patience)
    assert solution.iterations.tolist() == [ends]
    for token, best in enumerate((1, 4, 2)):
        assert torch.equal(solution.state[:, token], values[best][:, token]), token
    assert solution.converged.tolist() == [False]
    assert solution.residual.item() == pytest.approx(0.1)


def test_settled_is_remembered_while_a_residual_stays_near_the_tolerance_and_no_longer() -> None:
    # token 0 ends at the fifth evaluation. Of the others, one rises just above the tolerance meanwhile, one far: it begins anew
    slow, near, far = [1.0, 0.5, 0.3, 0.1, 0.0], [1.0, 5e-4, 2e-3], [1.0, 5e-4, 2e-2, 2e-2, 2e-2, 5e-4]
    config = SolverConfig(method="picard", tolerance=1e-3, patience=20, max_iterations=50)
    for later, ends, best in ((near, 5, 1), (far, 6, 5)):
        f, values = staged([slow, later])
        solution = solve_strict(f, normal(3, (1, 2, WIDTH)), config)
        assert solution.iterations.tolist() == [ends]
        assert torch.equal(solution.state[:, 1], values[best][:, 1])
        assert solution.converged.tolist() == [True]


def test_patience_is_of_the_token_not_of_its_neighbours() -> None:
    # what a later token does, stalling or converging, changes no bit of those before it
    slow = [0.5 * 0.8**k for k in range(60)]
    config = SolverConfig(method="picard", tolerance=1e-3, patience=2, max_iterations=60)
    start = normal(3, (1, 2, WIDTH))
    states = [solve_strict(staged([slow, later])[0], start, config).state[:, 0] for later in ([1e-9], [0.5], slow[::-1])]
    assert all(torch.equal(states[0], state) for state in states[1:])


def test_never_finite_returns_the_start() -> None:
    start = normal(2, (2, 2, WIDTH))
    solution = solve_strict(lambda y: y * float("nan"), start, SolverConfig(patience=3))
    assert torch.equal(solution.state, start)
    assert solution.iterations.tolist() == [3, 3]
    assert not bool(solution.converged.any())


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Which of [2, 6] tokens are padding: two of the first sequence, none of the second."""
    return torch.arange(6)[None] >= torch.tensor([[4], [6]]), normal(7, (2, 6, WIDTH))


def test_padding_on_the_right_changes_and_delays_nothing(padded: tuple[Tensor, Tensor]) -> None:
    padding, start = padded
    config = SolverConfig(tolerance=1e-7, max_iterations=100)
    both = solve_strict(coupled, start, config, done=padding.clone())
    alone = solve_strict(lambda y: coupled(torch.cat((y, y[:, :2]), dim=1))[:, :4], start[:1, :4], config)
    torch.testing.assert_close(both.state[:1, :4], alone.state, rtol=1e-12, atol=1e-12)
    assert torch.equal(both.state[0, 4:], start[0, 4:])
    assert int(both.iterations[0]) == int(alone.iterations)
    assert bool(both.converged.all())
    assert float(both.residual[0]) == pytest.approx(float(alone.residual), rel=1e-6)


def test_padding_that_never_converges_costs_no_evaluation() -> None:
    f, _ = staged([[0.5, 1e-6], [0.5]])
    done = torch.tensor([[False, True]])
    solution = solve_strict(f, normal(1, (1, 2, WIDTH)), SolverConfig(method="picard"), done=done)
    assert solution.iterations.tolist() == [2]
    assert bool(solution.converged)


def test_the_map_sees_which_tokens_still_change() -> None:
    done = torch.zeros(1, 3, dtype=torch.bool)
    seen: list[list[bool]] = []
    f, _ = staged([[1e-9], [0.5, 1e-9], [0.5, 0.5, 1e-9]])

    def watched(y: Tensor) -> Tensor:
        seen.append(done[0].tolist())
        return f(y)

    solve_strict(watched, normal(1, (1, 3, WIDTH)), SolverConfig(method="picard", tolerance=1e-6), done=done)
    assert seen == [[False] * 3, [True, False, False], [True, True, False]]


def test_a_map_that_rounds_to_bf16_ends_by_patience(trained: LanguageModel) -> None:
    # no token can come below bf16's rounding: without patience every solve would take all its evaluations
    f, start = map_and_start(trained, random_tokens(2, 32, vocabulary=256))
    rounded = lambda y: f(y.bfloat16().float()).bfloat16().float()  # noqa: E731
    config = SolverConfig(tolerance=1e-6, max_iterations=64)
    solution = solve_strict(rounded, start, config)
    exact = solve_strict(f, start, config)
    assert int(solution.iterations.max()) < 32
    assert bool(exact.converged.all())
    assert float(token_residual(solution.state - exact.state, exact.state).max()) < 2e-2
    patient = solve_strict(rounded, start, replace(config, patience=64))
    assert int(patient.iterations.max()) == 64
