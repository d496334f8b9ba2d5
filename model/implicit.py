"""Gradients at the equilibrium: what stands for u = (I - J^T)^-1 v, with v = dL/dy*, J = df/dy at y*.

    dL/dtheta = u^T df/dtheta,   dL/dy0 = u^T df/dy0          (implicit function theorem)
    one_step   u = v
    neumann    u = sum_{i=0..k} (J^T)^i v                      k = 1 is what the published code calls 'onestep'
    adjoint    u = J^T u + v, solved
    phantom    no u: k damped differentiable steps y <- lambda f(y) + (1 - lambda) y from y*      (Geng et al. 2021)

Parameters and y0 enter autograd through exactly one differentiable application of f (k for phantom), so the hooks of data
parallelism and ZeRO fire once a backward. neumann and adjoint put a node behind that application which turns v into u by
vector-Jacobian products of its graph alone: those reach no parameter. Nothing of the solve is kept for backward.

The value returned is f(y*): the equilibrium after one application more. Penalties are of the application at y*, which is phantom's first.
Where the tokens of a sequence are divided over ranks, v, u and y* are this rank's and f's collectives make J^T the whole sequence's.
Shapes: y*, y0, f, u, v [b, s, w].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.config import GradientConfig, SolverConfig
from model.fixed_point import UNDIVIDED, Map, Tokens, relative_residual, solve


class Attached(NamedTuple):
    """A differentiable equilibrium, and what it cost."""

    output: Tensor
    """f(y*) (phantom: k steps on), [b, s, w]."""
    penalty: Tensor | None
    """Weighted convergence and Jacobian penalties, a scalar; None where both weights are 0."""
    products: Tensor
    """Scalar int64: vector-Jacobian products a sequence, filled in when backward has run (adjoint: as many as it took)."""


def attach(
    f: Map, equilibrium: Tensor, config: GradientConfig, solver: SolverConfig, recompute: bool = False, tokens: Tokens = UNDIVIDED
) -> Attached:
    """Make the equilibrium [b, s, w] of f differentiable; f closes over y0 and the parameters.

    recompute: f's inner activations are computed again in backward (one_step and phantom; the others go through them often).
    """
    point = equilibrium.detach()
    products = torch.zeros((), dtype=torch.int64)
    apply = _recomputed(f) if recompute else f
    needs_point = config.mode in ("neumann", "adjoint") or config.jacobian_penalty > 0
    point.requires_grad_(needs_point)
    with sdpa_kernel(SDPBackend.MATH) if config.jacobian_penalty else nullcontext():  # no fused kernel has a second derivative
        output = f(point) if needs_point else apply(point)
    penalty = _penalty(output, point, config, tokens) if config.convergence_penalty or config.jacobian_penalty else None
    if config.mode == "phantom":
        output = _phantom(apply, point.detach(), output, config)
    elif config.mode != "one_step":
        output = _Adjoint.apply(output, point, config, solver, products, tokens)
    return Attached(output, penalty, products)


def _recomputed(f: Map) -> Map:
    return lambda y: checkpoint(f, y, use_reentrant=False, preserve_rng_state=False)


def _phantom(f: Map, y: Tensor, value: Tensor, config: GradientConfig) -> Tensor:
    """k damped steps from y, the first of which has been evaluated: value is f(y)."""
    for step in range(config.steps):
        value = value if step == 0 else f(y)
        y = value if config.damping == 1 else torch.lerp(y, value.to(y.dtype), config.damping)
    return y


def _penalty(output: Tensor, point: Tensor, config: GradientConfig, tokens: Tokens) -> Tensor:
    total = output.new_zeros(())
    if config.convergence_penalty:
        held = point.detach()
        total = total + config.convergence_penalty * relative_residual(output - held, held, "norm", tokens).square().mean()
    if config.jacobian_penalty:
        noise = torch.randn_like(output)
        (product,) = torch.autograd.grad(output, point, noise, create_graph=True)
        total = total + config.jacobian_penalty * product.square().mean()
    return total


class _Adjoint(torch.autograd.Function):
    """The identity forward; backward turns v into u and hands it on to the graph of the one application."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, point: Tensor, config: GradientConfig, solver: SolverConfig, products: Tensor, tokens: Tokens
    ) -> Tensor:
        ctx.graph = output, point
        ctx.config, ctx.solver, ctx.products, ctx.tokens = config, solver, products, tokens
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        output, point = ctx.graph
        v, config, tokens = grads[0], ctx.config, ctx.tokens

        def product(u: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(output, point, u.to(output.dtype), retain_graph=True)
            return _clip(result, v, config.clip, tokens)

        if config.mode == "neumann":
            u, count = _neumann(product, v, config.steps), config.steps
        else:
            u, count = _solve_adjoint(product, v, config, ctx.solver, tokens)
        ctx.products.fill_(count)
        ctx.graph = None
        return u, None, None, None, None, None


def _neumann(product: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> Tensor:
    term = total = v
    for _ in range(steps):
        term = product(term)
        total = total + term
    return total


def _solve_adjoint(
    product: Callable[[Tensor], Tensor], v: Tensor, config: GradientConfig, solver: SolverConfig, tokens: Tokens
) -> tuple[Tensor, int]:
    """u = J^T u + v. A linear system with no causal order to keep (J^T looks ahead), so mixing is over whole sequences, where
    Anderson is GMRES in disguise, with a window long enough for it to matter."""
    linear = replace(
        solver,
        tolerance=config.tolerance or solver.tolerance,
        max_iterations=config.max_iterations or solver.max_iterations,
        min_iterations=1,
        mixing="sequence",
        history=max(4, solver.history),
    )
    solution = solve(lambda u: product(u) + v, v, linear, tokens=tokens)
    return solution.state.to(v.dtype), solution.evaluations // max(1, v.shape[0])


def _clip(product: Tensor, v: Tensor, bound: float | None, tokens: Tokens) -> Tensor:
    """Each sequence's product scaled down to at most bound * ||v||."""
    if bound is None:
        return product
    ratio = relative_residual(product, v, "norm", tokens)[:, None, None]
    return product * (bound / ratio.clamp_min(bound))
