"""Gradients at the equilibrium against three independent references: a long unrolled loop, a dense Jacobian, hand-written loops.

Everything is float64 and small enough for J to be written out. The solve is converged to 1e-13, so that what differs is the
gradient's formula and not the point it is taken at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import Context
from model.config import GradientConfig, SolverConfig
from model.fixed_point import solve
from model.implicit import attach
from model.language_model import build
from model.refine import Refine
from tests.model.support import configuration, double_refine, plain_context, random_tokens, relative

BATCH, LENGTH, WIDTH = 2, 6, 16
SHAPE = (BATCH, LENGTH, WIDTH)
EXACT = SolverConfig(method="picard", tolerance=1e-14, max_iterations=400)
INJECTIONS = ("additive", "concat", "cross_attention")


def normal(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Problem:
    """A real attractor map in float64 with its proposal, its equilibrium and a loss sum(c sin y) that is not linear in y."""

    def __init__(self, injection: str = "additive", layers: int = 1, **backbone: Any) -> None:
        self.config = configuration(attractor={"injection": injection, "layers": layers, "gate_maximum": 0.5}, model=backbone)
        self.refine: Refine = double_refine(self.config)
        self.context: Context = plain_context(self.config, BATCH, LENGTH)
        self.y0 = normal(1, 2.0).requires_grad_()
        self.weights = normal(2)
        self.leaves = [self.y0, *self.refine.attractor.parameters()]
        with torch.no_grad():
            self.solution = solve(self.f, self.y0, EXACT)
        assert self.solution.residual.max() < 1e-12

    def f(self, y: Tensor) -> Tensor:
        return self.refine.attractor(y, self.y0, self.context)

    def loss(self, y: Tensor) -> Tensor:
        return (self.weights * y.sin()).sum()

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(y), self.leaves))

    def attached(self, **gradient: Any) -> list[Tensor]:
        solver = SolverConfig(method=gradient.pop("method", "anderson"))
        config = GradientConfig(tolerance=1e-12, max_iterations=300, **gradient)
        return self.gradients(attach(self.f, self.solution.state, config, solver).output)

    def v(self) -> Tensor:
        """dL/dy at the equilibrium, flat."""
        return (self.weights * self.solution.state.cos()).flatten()

    def jacobian(self) -> Tensor:
        dense = torch.autograd.functional.jacobian(self.f, self.solution.state)
        return dense.reshape(self.v().numel(), self.v().numel())

    def pulled_back(self, u: Tensor) -> list[Tensor]:
        """u^T df/dtheta and u^T df/dy0 by one ordinary backward pass."""
        return list(torch.autograd.grad(self.f(self.solution.state), self.leaves, u.reshape(SHAPE)))


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    assert all(reference.norm() > 0 for reference in want), "a reference gradient that is zero proves nothing"
    return max(relative(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("method", ["picard", "anderson"])
@pytest.mark.parametrize("layers", [1, 2])
def test_adjoint_equals_200_unrolled_iterations(method: str, layers: int) -> None:
    problem = Problem(layers=layers)
    y = problem.y0
    for _ in range(200):
        y = problem.f(y)
    # the map contracts at least 0.87-fold an iteration, so 200 leave 1e-12; the adjoint solve stops at 1e-12
    assert worst(problem.attached(mode="adjoint", method=method), problem.gradients(y)) < 1e-6


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("backbone", [{}, {"kv_heads": 1, "mlp": "swiglu", "qk_norm": False}], ids=["relu2", "gqa-swiglu"])
def test_adjoint_equals_a_dense_solve(injection: str, backbone: dict[str, Any]) -> None:
    problem = Problem(injection, **backbone)
    identity = torch.eye(problem.v().numel(), dtype=torch.float64)
    u = torch.linalg.solve(identity - problem.jacobian().T, problem.v())
    # float64: dense solve and iteration agree to the iteration's tolerance, 1e-12, times the conditioning of I - J (< 100)
    assert worst(problem.attached(mode="adjoint"), problem.pulled_back(u)) < 1e-9


@pytest.mark.parametrize("injection", [*INJECTIONS, "init_only"])
def test_one_step_equals_one_application(injection: str) -> None:
    if injection == "init_only":  # its map has no contraction to speak of: any point serves, and df/dy0 is the identity
        problem = Problem.__new__(Problem)
        problem.config = configuration(attractor={"injection": injection})
        problem.refine, problem.context = double_refine(problem.config), plain_context(problem.config, BATCH, LENGTH)
        problem.y0, problem.weights, point = normal(1).requires_grad_(), normal(2), normal(3)
        problem.leaves = [problem.y0, *problem.refine.attractor.parameters()]
        got = problem.gradients(attach(problem.f, point, GradientConfig(), EXACT).output)
        value = problem.f(point)
        assert torch.equal(got[0], problem.weights * value.detach().cos())
        assert worst(got, list(torch.autograd.grad(problem.loss(value), problem.leaves))) == 0
        return
    problem = Problem(injection)
    # same operations in the same order: rounding only
    assert worst(problem.attached(mode="one_step"), problem.pulled_back(problem.v())) < 1e-12


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_neumann_equals_its_truncated_series(injection: str, steps: int) -> None:
    problem = Problem(injection)
    transposed, term = problem.jacobian().T, problem.v()
    u = term.clone()
    for _ in range(steps):
        term = transposed @ term
        u = u + term
    # float64 rounding of a few matrix products
    assert worst(problem.attached(mode="neumann", steps=steps), problem.pulled_back(u)) < 1e-11
    assert worst(problem.attached(mode="neumann", steps=steps + 1), problem.pulled_back(u)) > 1e-8, "one term more must be seen"


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 1.0), (1, 0.5), (4, 0.3)])
def test_phantom_equals_a_written_out_loop(steps: int, damping: float) -> None:
    problem = Problem()
    point = normal(5, 2.0)  # away from the equilibrium, where damping changes the value too
    y = point
    for _ in range(steps):
        y = damping * problem.f(y) + (1 - damping) * y
    output = attach(problem.f, point, GradientConfig(mode="phantom", steps=steps, damping=damping), EXACT).output
    assert relative(output, y) < 1e-14
    assert worst(problem.gradients(output), problem.gradients(y)) < 1e-12


@pytest.mark.parametrize("mode", ["one_step", "neumann", "adjoint"])
def test_output_is_one_application_at_the_equilibrium(mode: str) -> None:
    problem, point = Problem(), normal(5)
    output = attach(problem.f, point, GradientConfig(mode=mode), EXACT).output  # type: ignore[arg-type]
    assert torch.equal(output, problem.f(point))


@pytest.mark.parametrize("mode", ["one_step", "phantom"])
def test_recomputation_changes_no_bit(mode: str) -> None:
    problem = Problem(layers=2)
    config = GradientConfig(mode=mode, steps=2)  # type: ignore[arg-type]
    results = [problem.gradients(attach(problem.f, problem.solution.state, config, EXACT, recompute).output) for recompute in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["one_step", "neumann", "phantom", "adjoint"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_is_accumulated_once_a_backward(mode: str, recompute: bool) -> None:
    # the hooks of data parallelism and ZeRO hang on accumulation: twice is 'gradient computed twice', never is a lost reduction
    config = configuration(gradient={"mode": mode, "steps": 2}, attractor={"layers": 2}, solver={"tolerance": 1e-4})
    model = build(config, recompute=recompute)
    counts = dict.fromkeys((name for name, _ in model.named_parameters()), 0)

    def counter(name: str) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            counts[name] += 1

        return count

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(counter(name))
    for backward in (1, 2):  # and again with accumulation
        loss, _ = model(random_tokens(2, 8), random_tokens(2, 8, seed=1))
        loss.backward()
        assert set(counts.values()) == {backward}, counts


@pytest.mark.parametrize("mode", ["one_step", "neumann", "phantom", "adjoint"])
def test_accumulated_gradients_add_up(mode: str) -> None:
    config = configuration(gradient={"mode": mode, "tolerance": 1e-10, "max_iterations": 200}, solver={"tolerance": 1e-10})
    model = build(config, dtype=torch.float64)
    batches = [(random_tokens(2, 8, seed=seed), random_tokens(2, 8, seed=seed + 10)) for seed in (0, 1)]
    singles = []
    for tokens, targets in batches:
        model.zero_grad()
        model(tokens, targets)[0].backward()
        singles.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    model.zero_grad()
    for tokens, targets in batches:
        model(tokens, targets)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, singles[0][name] + singles[1][name], rtol=1e-12, atol=1e-14)


class LinearMap:
    """f(y) = y A^T + b on every token: J^T acts as A^T on each, and dL/db is u itself, so u can be looked at."""

    def __init__(self, radius: float) -> None:
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
        self.matrix = radius * matrix / torch.linalg.matrix_norm(matrix, 2)
        self.shift = normal(4).requires_grad_()

    def __call__(self, y: Tensor) -> Tensor:
        return y @ self.matrix.T + self.shift

    def transposed_product(self, u: Tensor) -> Tensor:
        return u @ self.matrix

    def u(self, v: Tensor, config: GradientConfig) -> tuple[Tensor, int]:
        attached = attach(self, normal(6), config, SolverConfig(tolerance=1e-12, max_iterations=500))
        (u,) = torch.autograd.grad(attached.output, self.shift, v)
        return u, int(attached.products)


def clipped(product: Tensor, v: Tensor, bound: float) -> Tensor:
    """Row by row, as the definition says it."""
    rows = []
    for one, reference in zip(product, v, strict=True):
        limit = bound * reference.norm()
        rows.append(one if one.norm() <= limit else one * (limit / one.norm()))
    return torch.stack(rows)


def test_clip_bounds_each_sequence_by_itself() -> None:
    linear, v = LinearMap(0.9), normal(7)
    v[1] *= 1e-3
    free = linear.transposed_product(v)
    bound = float(0.5 * (free[0].norm() / v[0].norm() + free[1].norm() / v[1].norm()))  # one sequence above it, one below
    u, _ = linear.u(v, GradientConfig(mode="neumann", clip=bound))
    torch.testing.assert_close(u, v + clipped(free, v, bound), rtol=1e-12, atol=0)
    assert not torch.allclose(u, v + free)
    unclipped, _ = linear.u(v, GradientConfig(mode="neumann", clip=100.0))
    torch.testing.assert_close(unclipped, v + free, rtol=1e-12, atol=0)


def test_adjoint_clip_solves_the_clipped_equation() -> None:
    linear, v, bound = LinearMap(0.9), normal(7), 0.5
    u, _ = linear.u(v, GradientConfig(mode="adjoint", clip=bound))
    product = linear.transposed_product(u)
    assert (product.flatten(1).norm(dim=1) > bound * v.flatten(1).norm(dim=1)).any(), "the bound must bind to be tested"
    assert relative(u, v + clipped(product, v, bound)) < 1e-10  # the solve's tolerance, 1e-12, times 1 / (1 - 0.9)


def test_products_are_counted_when_backward_has_run() -> None:
    linear, v = LinearMap(0.9), normal(7)
    assert linear.u(v, GradientConfig(mode="one_step"))[1] == 0
    assert linear.u(v, GradientConfig(mode="neumann", steps=3))[1] == 3
    few, many = (linear.u(v, GradientConfig(mode="adjoint", tolerance=tolerance))[1] for tolerance in (1e-1, 1e-10))
    assert 1 <= few < many
    assert linear.u(v, GradientConfig(mode="adjoint", tolerance=1e-12, max_iterations=4))[1] == 4


def test_a_gradient_that_is_zero_for_a_sequence_stays_zero() -> None:
    # a row whose targets are all ignored sends v = 0: relative residuals of it are 0 / 0
    linear, v = LinearMap(0.9), normal(7)
    v[0] = 0
    for mode in ("neumann", "adjoint"):
        u, _ = linear.u(v, GradientConfig(mode=mode, clip=1.0))
        assert torch.equal(u[0], torch.zeros_like(u[0]))
        assert u[1].isfinite().all()


def test_tiny_gradients_are_solved_as_well_as_large_ones() -> None:
    # a mean over tokens and accumulation steps makes v about 1e-6; the adjoint solve may not depend on that scale
    linear, v = LinearMap(0.95), normal(7)
    large, count = linear.u(v, GradientConfig(mode="adjoint", tolerance=1e-6))
    small, count_small = linear.u(v * 2.0**-20, GradientConfig(mode="adjoint", tolerance=1e-6))
    assert count_small == count
    torch.testing.assert_close(small * 2.0**20, large, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["one_step", "neumann", "adjoint", "phantom"])
def test_convergence_penalty_is_its_definition(mode: str) -> None:
    problem, point = Problem(), normal(5, 2.0)
    config = GradientConfig(mode=mode, convergence_penalty=0.3)  # type: ignore[arg-type]
    penalty = attach(problem.f, point, config, EXACT).penalty
    assert penalty is not None
    change = problem.f(point) - point
    want = 0.3 * torch.stack([r.square().sum() / p.square().sum() for r, p in zip(change, point, strict=True)]).mean()
    torch.testing.assert_close(penalty, want, rtol=1e-12, atol=0)
    got = torch.autograd.grad(penalty, problem.leaves)
    assert worst(list(got), list(torch.autograd.grad(want, problem.leaves))) < 1e-11


def test_jacobian_penalty_estimates_the_frobenius_norm() -> None:
    problem = Problem()
    want = float(problem.jacobian().square().sum()) / problem.v().numel()
    config, draws = GradientConfig(jacobian_penalty=2.0), 200
    torch.manual_seed(0)
    total = 0.0
    for _ in range(draws):
        penalty = attach(problem.f, problem.solution.state, config, EXACT).penalty
        assert penalty is not None
        total += float(penalty.detach())
    # Hutchinson's relative deviation is at most sqrt(2 / rank) a draw; J has rank far above 10 here, so 5 % is over 5 deviations
    assert total / draws == pytest.approx(2 * want, rel=0.05)


@pytest.mark.parametrize("mode", ["one_step", "neumann", "adjoint", "phantom"])
def test_jacobian_penalty_trains_the_whole_model(mode: str) -> None:
    # fused attention has no second derivative, on the CPU or on a GPU: the penalty must see to it itself
    config = configuration(gradient={"mode": mode, "jacobian_penalty": 1.0}, solver={"tolerance": 1e-4})
    model = build(config)
    loss, record = model(random_tokens(2, 8), random_tokens(2, 8, seed=1))
    assert loss.detach() > record["cross_entropy"]
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_jacobian_penalty_has_the_right_gradient() -> None:
    problem, config = Problem(), GradientConfig(jacobian_penalty=1.0)

    def penalty() -> Tensor:
        torch.manual_seed(0)
        value = attach(problem.f, problem.solution.state, config, EXACT).penalty
        assert value is not None
        return value

    matrix = problem.refine.attractor.blocks[0].mlp.up.weight  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(penalty(), matrix)  # type: ignore[arg-type]
    direction = torch.randn(matrix.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            matrix += sign * step * direction  # type: ignore[operator]
        values.append(float(penalty().detach()))
        with torch.no_grad():
            matrix -= sign * step * direction
    # central differences: error step^2 times a third derivative of order one, plus rounding 1e-16 / step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_penalties_do_not_change_what_phantom_computes() -> None:
    problem = Problem()
    plain, penalised = GradientConfig(mode="phantom", steps=3, damping=0.5), GradientConfig("phantom", 3, 0.5, jacobian_penalty=1.0)
    outputs = [attach(problem.f, normal(5), config, EXACT).output for config in (plain, penalised)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(output.square().sum(), problem.leaves) for output in outputs)
    assert worst(list(got), list(want)) < 1e-11


def test_no_gradient_is_kept_on_the_solution() -> None:
    problem = Problem()
    refined = problem.refine(problem.y0, problem.context)
    assert not refined.solution.state.requires_grad
    assert refined.output.requires_grad
    with torch.no_grad():
        assert not problem.refine(problem.y0, problem.context).output.requires_grad
