"""The solvers on maps whose fixed points are known, and on maps that misbehave; Anderson mixing against a least-squares reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import SolverConfig
from model.fixed_point import Map, Solution, relative_residual, solve, token_residual
from model.language_model import build
from tests.model.support import configuration, map_and_start, random_tokens, relative

BATCH, LENGTH, WIDTH = 3, 5, 8
SHAPE = (BATCH, LENGTH, WIDTH)
METHODS: list[dict[str, Any]] = [
    {"method": "picard"},
    {"method": "picard", "damping": 0.7},
    {"method": "anderson", "mixing": "token", "history": 2},
    {"method": "anderson", "mixing": "token", "history": 4, "damping": 0.9},
    {"method": "anderson", "mixing": "sequence", "history": 4},
]
method = pytest.mark.parametrize("fields", METHODS, ids=lambda fields: "-".join(str(value) for value in fields.values()))


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(normal(seed, (len(eigenvalues), len(eigenvalues))))
    return basis @ torch.diag(eigenvalues) @ basis.T


def contraction(largest: float, width: int = WIDTH, smallest: float = 0.0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f(y) = y A + b on every token, with eigenvalues spread evenly from smallest to largest, and its exact fixed point."""
    matrix = symmetric(torch.linspace(smallest, largest, width, dtype=torch.float64))
    shift = normal(1, (BATCH, LENGTH, width))
    exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - matrix, shift.reshape(-1, width).T).T.reshape(shift.shape)
    return lambda y: y @ matrix + shift, exact


def coupled(y: Tensor) -> Tensor:
    """A causal, smooth contraction in which a token reads the mean of those before it."""
    before = y.cumsum(1) / torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]
    matrix = symmetric(torch.linspace(-0.7, 0.9, y.shape[-1], dtype=torch.float64), seed=3).to(y.dtype)
    return 0.7 * torch.tanh(y @ matrix) + 0.25 * before + normal(4, (1, y.shape[1], y.shape[2])).to(y.dtype)


def by_sequence(rates: list[float]) -> tuple[Map, Callable[[Tensor], Map]]:
    """f(y) = rate_i y + 1 elementwise, a rate a sequence, and its restriction to some rows."""
    rate = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    return (lambda y: rate * y + 1), lambda rows: lambda y: rate[rows] * y + 1


# ---- the fixed point, and how many evaluations it takes


@method
def test_linear_contraction_is_solved_to_tolerance(fields: dict[str, Any]) -> None:
    f, exact = contraction(0.8, smallest=-0.8)
    solution = solve(f, torch.zeros(SHAPE, dtype=torch.float64), SolverConfig(tolerance=1e-9, max_iterations=300, **fields))
    assert bool(solution.converged.all())
    assert (solution.residual < 1e-9).all()
    # ||y - y*|| <= ||r|| / (1 - L) with L = 0.8, and f takes the state one contraction further
    assert relative(solution.state, exact) < 1e-9 / (1 - 0.8)


@pytest.mark.parametrize("mixing", ["token", "sequence"])
@pytest.mark.parametrize("history", [1, 2, 4])
@pytest.mark.parametrize("damping", [1.0, 0.9])
@pytest.mark.parametrize("evaluations", [1, 2, 3, 6])
def test_anderson_equals_a_least_squares_reference(mixing: str, history: int, damping: float, evaluations: int) -> None:
    start = normal(5)
    counts = {"min_iterations": evaluations, "max_iterations": evaluations}
    config = SolverConfig(mixing=mixing, history=history, damping=damping, ridge=1e-14, **counts)  # type: ignore[arg-type]
    solution = solve(coupled, start, config)
    assert int(solution.fallbacks) == 0, "the reference below knows no fallback"
    # float64 rounding, squared condition (Gram matrix) of at most 1e4 here
    assert relative(solution.state, anderson_reference(coupled, start, evaluations, history, damping, mixing == "token")) < 1e-8


def anderson_reference(f: Callable[[Tensor], Tensor], y: Tensor, evaluations: int, history: int, damping: float, by_token: bool) -> Tensor:
    """Type-II Anderson mixing as in Walker & Ni (2011), unit by unit, by an orthogonal least-squares solve; the last value of f."""
    width, values, changes = y.shape[-1], [], []
    units = (lambda t: t.reshape(-1, width)) if by_token else (lambda t: t.flatten(1))
    for step in range(evaluations):
        value = f(y)
        values.append(value)
        changes.append(value - y)
        if step == 0:
            y = y + damping * changes[-1]
            continue
        used = range(max(1, step + 1 - history), step + 1)
        dvalues = torch.stack([units(values[i] - values[i - 1]) for i in used], dim=-1)
        dchanges = torch.stack([units(changes[i] - changes[i - 1]) for i in used], dim=-1)
        gamma = torch.linalg.lstsq(dchanges, units(changes[-1])[..., None]).solution
        mixed_value = units(values[-1]) - (dvalues @ gamma)[..., 0]
        mixed_change = units(changes[-1]) - (dchanges @ gamma)[..., 0]
        y = (mixed_value - (1 - damping) * mixed_change).reshape(y.shape)
    return values[-1]


@pytest.mark.parametrize("mixing", ["token", "sequence"])
@pytest.mark.parametrize("history", [1, 2, 4])
def test_anderson_needs_fewer_evaluations_than_plain_iteration(mixing: str, history: int) -> None:
    f, _ = contraction(0.95, width=16)
    start = torch.zeros(BATCH, LENGTH, 16)

    def needed(**fields: Any) -> int:
        function = lambda y: f(y.double()).float()  # noqa: E731
        solution = solve(function, start, SolverConfig(tolerance=1e-4, max_iterations=400, **fields))
        assert bool(solution.converged.all())
        return int(solution.iterations.max())

    assert needed(mixing=mixing, history=history) < 0.7 * needed(method="picard")


@method
def test_the_first_evaluation_counts(fields: dict[str, Any]) -> None:
    f, exact = contraction(0.8)
    solution = solve(f, exact, SolverConfig(**fields))
    assert solution.iterations.tolist() == [1] * BATCH
    assert solution.evaluations == BATCH
    assert relative(solution.state, exact) < 1e-14


@method
@pytest.mark.parametrize("minimum", [2, 5])
def test_min_iterations_are_done_and_no_more(fields: dict[str, Any], minimum: int) -> None:
    f, exact = contraction(0.8)
    solution = solve(f, exact, SolverConfig(min_iterations=minimum, **fields))
    assert solution.iterations.tolist() == [minimum] * BATCH
    assert bool(solution.converged.all())


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 12), damping=st.sampled_from([1.0, 0.6]), seed=st.integers(0, 99))
def test_a_fixed_count_of_plain_iteration_is_f_applied_that_often(count: int, damping: float, seed: int) -> None:
    start = normal(seed)
    config = SolverConfig(method="picard", damping=damping, min_iterations=count, max_iterations=count)
    solution = solve(coupled, start, config)
    y = start
    for _ in range(count - 1):
        y = coupled(y) if damping == 1 else torch.lerp(y, coupled(y), damping)
    assert torch.equal(solution.state, coupled(y))
    assert solution.iterations.tolist() == [count] * BATCH
    assert solution.evaluations == count * BATCH
    torch.testing.assert_close(solution.residual, (coupled(y) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))


@method
def test_adaptive_equals_fixed_when_the_counts_agree(fields: dict[str, Any]) -> None:
    start = normal(7)[:1]
    config = SolverConfig(tolerance=1e-6, max_iterations=100, **fields)
    adaptive = solve(coupled, start, config)
    count = int(adaptive.iterations)
    assert 2 < count < 100
    fixed = solve(coupled, start, replace(config, min_iterations=count, max_iterations=count))
    assert torch.equal(adaptive.state, fixed.state)
    torch.testing.assert_close(adaptive.residual, fixed.residual, rtol=1e-6, atol=0, check_dtype=False)  # read back as fp32
    assert bool(fixed.converged.all())


def test_stop_by_the_worst_token_is_stricter_than_by_the_norm() -> None:
    # one token far from its fixed point hides in the norm of many that are done
    f, exact = contraction(0.8)
    start = exact.clone()
    start[:, 0] *= 1.2
    norm, worst = (solve(f, start, SolverConfig(method="picard", tolerance=2e-3, stop=stop)) for stop in ("norm", "max_token"))
    assert (norm.iterations < worst.iterations).all()


def test_residuals_are_their_definitions() -> None:
    change, y = normal(1), normal(2)
    rows_by_token = [[float(change[i, t].norm() / y[i, t].norm()) for t in range(LENGTH)] for i in range(BATCH)]
    by_token = torch.tensor(rows_by_token, dtype=torch.float64)
    torch.testing.assert_close(token_residual(change, y), by_token)
    torch.testing.assert_close(relative_residual(change, y, "max_token"), by_token.amax(1))
    rows = [float(change[i].reshape(-1).norm() / y[i].reshape(-1).norm()) for i in range(BATCH)]
    torch.testing.assert_close(relative_residual(change, y), torch.tensor(rows, dtype=torch.float64))
    assert relative_residual(torch.zeros(SHAPE), torch.zeros(SHAPE)).tolist() == [0.0] * BATCH


# ---- what goes wrong stays where it is


@method
@pytest.mark.parametrize("compaction", [False, True])
@pytest.mark.parametrize("bad", ["nan", "inf", "diverging", "expanding slowly"])
def test_a_bad_sequence_does_not_change_the_others(fields: dict[str, Any], compaction: bool, bad: str) -> None:
    rates = {"nan": float("nan"), "inf": float("inf"), "diverging": 30.0, "expanding slowly": 1.5}
    config = SolverConfig(tolerance=1e-8, max_iterations=120, compaction=compaction, **fields)
    good, restrict_good = by_sequence([0.5, 0.8])
    both, restrict_both = by_sequence([0.5, rates[bad], 0.8])
    start = normal(9)
    alone = solve(good, start[[0, 2]], config, restrict_good)
    together = solve(both, start, config, restrict_both)
    assert bool(alone.converged.all())
    # an elementwise map: a sequence sees the same numbers, up to the order in which a norm is summed
    torch.testing.assert_close(together.state[[0, 2]], alone.state, rtol=1e-12, atol=1e-13)
    assert together.iterations[[0, 2]].tolist() == alone.iterations.tolist()
    assert bool(together.converged[[0, 2]].all())
    assert together.state.isfinite().all()
    if fields["method"] == "picard" or bad in ("nan", "inf"):  # Anderson may well solve an expanding linear map
        assert not bool(together.converged[1])
    if bad in ("nan", "inf") and fields["method"] == "anderson":
        assert int(together.fallbacks) > 0


def test_anderson_recovers_after_one_value_that_is_not_finite() -> None:
    calls = 0

    def f(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = 0.5 * y + 1
        if calls == 3:
            value = value.clone()
            value[0] = value[0] * 1e300 * 1e300  # inf once, at one sequence
        return value

    # a map that is never finite again cannot be helped; what matters is that the fallback is plain, so nothing invents numbers
    solution = solve(f, normal(1), SolverConfig(tolerance=1e-8, max_iterations=40))
    assert solution.state.isfinite().all()
    assert solution.converged.tolist() == [False, True, True]
    assert solution.residual[0] < 1, "the best iterate, from before the accident, is what is returned"


@pytest.mark.parametrize("mixing", ["token", "sequence"])
def test_a_step_after_a_raised_residual_is_plain(mixing: str) -> None:
    # token 1 of sequence 0 jumps away at its third evaluation, everything else contracts; the fourth point tells what was done
    points: list[Tensor] = []
    rates = torch.linspace(0.2, 0.8, WIDTH, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        points.append(y)
        value = rates * y + 1
        if len(points) == 3:
            value = value.clone()
            value[0, 1] += 100
        return value

    config = SolverConfig(mixing=mixing, min_iterations=4, max_iterations=4)  # type: ignore[arg-type]
    solution = solve(f, normal(1), config)
    after = rates * points[2] + 1
    after[0, 1] += 100
    plain = (points[3] == after).all(dim=-1)
    want = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    want[0, 1 if mixing == "token" else slice(None)] = True
    assert torch.equal(plain, want)
    assert int(solution.fallbacks) == 1


@pytest.mark.parametrize("compaction", [False, True])
def test_the_best_iterate_is_returned_when_nothing_converges(compaction: bool) -> None:
    residuals = iter([1.0, 0.1, 0.5, 2.0, 0.3])
    values: list[Tensor] = []

    def f(y: Tensor) -> Tensor:
        values.append(y + next(residuals) * y)
        return values[-1]

    config = SolverConfig(method="picard", max_iterations=5, compaction=compaction)
    solution = solve(f, normal(1), config, lambda rows: lambda y: y)
    assert torch.equal(solution.state, values[1])
    assert solution.residual.tolist() == pytest.approx([0.1] * BATCH)
    assert solution.iterations.tolist() == [5] * BATCH
    assert not bool(solution.converged.any())


@pytest.mark.parametrize("compaction", [False, True])
@pytest.mark.parametrize("patience", [1, 3, 50])
def test_a_stalled_sequence_is_stopped_and_the_others_go_on(compaction: bool, patience: int) -> None:
    # sequence 0 changes by 1, 0.1 and then 0.2 of itself for ever; sequence 1 shrinks its residual tenfold each time
    stalled = [1.0, 0.1] + [0.2] * 60
    calls = 0

    def on(rows: list[int]) -> Callable[[Tensor], Tensor]:
        def f(y: Tensor) -> Tensor:
            nonlocal calls
            rates = torch.tensor([[stalled[calls], 10.0 ** -(calls + 1)][row] for row in rows], dtype=torch.float64)
            calls += 1
            return y + rates[:, None, None] * y

        return f

    config = SolverConfig(method="picard", tolerance=1e-9, max_iterations=20, patience=patience, compaction=compaction)
    start = normal(1)[:2]
    solution = solve(on([0, 1]), start, config, lambda rows: on(rows.tolist()))
    assert solution.converged.tolist() == [False, True]
    assert solution.iterations.tolist() == [min(2 + patience, 20), 10]
    assert float(solution.residual[0]) == pytest.approx(0.1)
    torch.testing.assert_close(solution.state[0], start[0] * 2 * 1.1)  # the value whose residual was lowest


def test_fallbacks_are_not_counted_for_sequences_that_are_done() -> None:
    # after convergence the residual wobbles at the rounding level: that is no event worth a line in a log
    rates = torch.tensor([0.1, 0.9], dtype=torch.float64)[:, None, None]

    def restrict(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: rates[rows] * y + 1 + 1e-9 * torch.sin(1e9 * y)

    config = SolverConfig(history=1, tolerance=1e-7, max_iterations=60, min_iterations=1)
    start = normal(3)[:2] + torch.linspace(0, 1, 2)[:, None, None]
    compact, full = (
        solve(restrict(torch.arange(2)), start, replace(config, compaction=compaction), restrict) for compaction in (True, False)
    )
    assert int(compact.fallbacks) == int(full.fallbacks)


# ---- compaction


@method
def test_compaction_changes_nothing_but_the_cost(fields: dict[str, Any]) -> None:
    f, restrict = by_sequence([0.1, 0.9, 0.5])
    start = normal(2)
    config = SolverConfig(tolerance=1e-9, max_iterations=300, **fields)
    compact, full = solve(f, start, config, restrict), solve(f, start, replace(config, compaction=False), restrict)
    assert torch.equal(compact.state, full.state)
    assert torch.equal(compact.residual, full.residual)
    assert compact.iterations.tolist() == full.iterations.tolist()
    assert full.evaluations == BATCH * int(full.iterations.max())
    assert compact.evaluations == int(compact.iterations.sum())
    if fields["method"] == "picard":
        assert compact.evaluations < full.evaluations


@method
def test_compaction_on_the_attractor_with_documents(fields: dict[str, Any]) -> None:
    # sequences of 1 to 24 documents converge at different times, and each must keep its own mask and its own proposal
    config = configuration(solver={"tolerance": 1e-9, "max_iterations": 200, **fields}, attractor={"gate_maximum": 0.5})
    model = build(config, dtype=torch.float64)
    tokens = random_tokens(4, 24)
    documents = torch.arange(24)[None] // torch.tensor([24, 6, 2, 1])[:, None]
    table = model.embedding.get_parameter("weight")
    with torch.no_grad():
        table.mul_(20)  # a proposal of norm one, where the map contracts
        table[tokens[2]] *= 3  # and one sequence that contracts faster
    proposal, context = model.propose(tokens, documents)
    assert model.refine is not None
    states = {}
    for compaction in (True, False):
        model.refine.solver = replace(config.solver, compaction=compaction)
        with torch.no_grad():
            states[compaction] = model.refine(proposal, context).solution
    compact, full = states[True], states[False]
    assert compact is not None
    assert full is not None
    assert bool(full.converged.all())
    assert len(set(full.iterations.tolist())) > 1, "all sequences converged at once: nothing was compacted"
    assert compact.evaluations == int(compact.iterations.sum()) < full.evaluations
    torch.testing.assert_close(compact.state, full.state, rtol=1e-9, atol=1e-10)  # f's rounding, amplified by mixing


# ---- precision, and what is read back from the device


@method
def test_state_and_residual_are_at_least_fp32(fields: dict[str, Any]) -> None:
    f, _ = contraction(0.8)
    seen: set[torch.dtype] = set()

    def half(y: Tensor) -> Tensor:
        seen.add(y.dtype)
        return f(y.double()).to(torch.bfloat16)

    for count in (3, 30):
        solution = solve(half, torch.zeros(SHAPE, dtype=torch.bfloat16), SolverConfig(min_iterations=3, max_iterations=count, **fields))
        assert solution.state.dtype == solution.residual.dtype == torch.float32
    assert seen == {torch.float32}
    assert solve(f, torch.zeros(SHAPE, dtype=torch.float64), SolverConfig(**fields)).state.dtype == torch.float64


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every way a tensor's value reaches Python, recorded."""
    met: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def recorded(self: Tensor, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            met.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, recorded)
    yield met
    monkeypatch.undo()


@method
def test_a_fixed_count_reads_nothing_back(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    start = normal(1)
    with reads(monkeypatch) as met:
        solve(coupled, start, SolverConfig(min_iterations=6, max_iterations=6, **fields))
    assert met == []
    # and on the meta device, where there is nothing to read
    matrix = torch.zeros(WIDTH, WIDTH, device="meta")
    config = SolverConfig(min_iterations=4, max_iterations=4, **fields)
    solution: Solution = solve(lambda y: y @ matrix, torch.zeros(SHAPE, device="meta"), config)
    assert solution.state.is_meta
    assert solution.iterations.is_meta
    assert solution.fallbacks.is_meta


@method
def test_an_adaptive_solve_reads_once_an_iteration(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    f, restrict = by_sequence([0.1, 0.9, 0.5])
    start = normal(1)
    with reads(monkeypatch) as met:
        solution = solve(f, start, SolverConfig(tolerance=1e-6, max_iterations=200, **fields), restrict)
    assert met == ["tolist"] * int(solution.iterations.max())


def test_solving_records_no_gradient() -> None:
    f, _ = contraction(0.8)
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    for count in (2, 20):
        solution = solve(lambda y: parameter * f(y), normal(1).requires_grad_(), SolverConfig(min_iterations=2, max_iterations=count))
        assert not solution.state.requires_grad


# ---- real maps


@pytest.mark.parametrize("fields", METHODS[2:], ids=["token2", "token4", "sequence4"])
def test_coefficients_survive_parallel_differences(fields: dict[str, Any]) -> None:
    # a single mode left makes all residual differences parallel: the Gram matrix is singular to fp32, and must do no harm
    rate = 0.9
    f = lambda y: rate * y + 1  # noqa: E731
    start = normal(1, dtype=torch.float32)
    anderson = solve(f, start, SolverConfig(tolerance=1e-6, max_iterations=100, **fields))
    assert bool(anderson.converged.all())
    assert int(anderson.iterations.max()) <= 5, "one secant step solves a map with one mode"
    assert relative(anderson.state, torch.full(SHAPE, 1 / (1 - rate))) < 1e-6 / (1 - rate) + 1e-6


def test_solve_starts_from_a_copy() -> None:
    f, _ = contraction(0.5)
    start = normal(1)
    before = start.clone()
    solution = solve(f, start, SolverConfig())
    solution.state.add_(1)
    assert torch.equal(start, before)


def test_trained_map_is_solved_from_its_proposal(trained: Any) -> None:
    tokens = random_tokens(2, 32, vocabulary=256)
    f, start = map_and_start(trained, tokens)
    solution = solve(f, start, SolverConfig(tolerance=1e-5))
    assert bool(solution.converged.all())
    # the returned state is one application past the point whose residual was measured
    assert relative(f(solution.state), solution.state) < 1e-5
