"""From proposal to equilibrium: solve y* = f(y*, y0), then make it differentiable.

`Refine` is the module that contains the solver's loop. An engine that gathers parameters on demand (ZeRO-3) treats it as a leaf:
its parameters are gathered once a solve, and ranks may take different numbers of iterations.

f is the attractor's map, or that of a deep equilibrium model (model/equilibrium.py); the solve begins at the proposal, at zero or at noise.

Under tensor parallelism the state, its residuals and Anderson's history are this rank's tokens, whatever the backbone does: f gathers
them on the way into its matrices and scatters its sums on the way out, which together carry the bytes of the all-reduce they replace.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Context
from model.attractor import Attractor
from model.config import ModelConfig, SolverConfig
from model.equilibrium import Equilibrium
from model.fixed_point import Map, Solution, relative_residual, solve
from model.implicit import attach
from model.layers import Layers
from model.noise import first_noise, seeds_of
from model.strict import solve_strict

Depth = int | str
"""How far to solve: a number of evaluations, "auto" (as configured) or "strict" (as generation with a cache would)."""


class Refined(NamedTuple):
    """What lies between the proposal and the final norm: of Refine here, and of Loop in model/looped.py."""

    output: Tensor
    """[b, s, w] (this rank's tokens), differentiable when gradients are on. Of Refine: the equilibrium, at least fp32."""
    solution: Solution | None
    penalty: Tensor | None = None
    products: Tensor | None = None
    """See model.implicit.Attached; None without gradients."""
    applications: float = 0.0
    """Applications of the map with gradients, a sequence."""
    distance: Tensor | None = None
    """||output - y0|| / ||y0|| [b], with gradients off, where there is a proposal to be near to; not computed in generation."""


class Refine(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, recompute: bool = False) -> None:
        super().__init__()
        self.divide, divided = layers.divide, layers.divided()
        self.tokens = divided.tokens
        self.attractor = (Equilibrium if config.model.kind == "deq" else Attractor)(config.model, config.attractor, divided)
        self.proposes = config.model.kind == "attractor"
        self.begin, self.std = config.start, math.sqrt(2 / (5 * config.model.width))
        self.solver, self.gradient, self.recompute = config.solver, config.gradient, recompute

    def forward(self, proposal: Tensor, context: Context, depth: Depth = "auto") -> Refined:
        """proposal y0 [b, s, w] in any precision.

        With gradients on, the output is differentiable and one application deeper than the solve. With gradients off, it is
        the state after `depth`; depth 0 is the proposal itself (a deq, which has none: its start), with no solution.
        """
        y0 = self.start(proposal)
        if not torch.is_grad_enabled():
            state, solution = self._at_depth(y0, context, depth)
            asked = self.proposes and context.cache is None
            return Refined(state, solution, distance=relative_residual(state - y0, y0, "norm", self.tokens) if asked else None)
        solution = self._solve(y0.detach(), context, self.solver)
        attached = attach(lambda y: self.attractor(y, y0, context), solution.state, self.gradient, self.solver, self.recompute, self.tokens)
        applications = self.gradient.steps if self.gradient.mode == "phantom" else 1
        return Refined(attached.output, solution, attached.penalty, attached.products, applications)

    def start(self, proposal: Tensor) -> Tensor:
        """y0: this rank's tokens of the proposal, in the solver's precision."""
        return self.divide(proposal).to(torch.promote_types(proposal.dtype, torch.float32))

    def _at_depth(self, y0: Tensor, context: Context, depth: Depth) -> tuple[Tensor, Solution | None]:
        if depth == 0:
            return y0 if self.proposes else self._beginning(y0, context), None
        if depth == "strict" and self.solver.fixed:  # no tolerance ends it: a count like any other
            solution = self._solve(y0, context, replace(self.solver, mixing="token"))
        elif depth == "strict":
            solution = self._solve_strict(y0, context)
        elif depth == "auto":
            solution = self._solve(y0, context, self.solver)
        else:
            solution = self._solve(y0, context, replace(self.solver, min_iterations=int(depth), max_iterations=int(depth)))
        return solution.state, solution

    def _solve_strict(self, y0: Tensor, context: Context) -> Solution:
        done, cache = None if context.padding is None else context.padding.clone(), context.cache
        if cache is not None and context.tokens.numel() > 1:  # a token alone is not evaluated again when it is done
            done = cache.done = torch.zeros_like(context.tokens, dtype=torch.bool) if done is None else done
        solution = solve_strict(lambda y: self.attractor(y, y0, context), self._beginning(y0, context), self.solver, self.tokens, done)
        if cache is not None:
            cache.done = None
        return solution

    def _solve(self, y0: Tensor, context: Context, solver: SolverConfig) -> Solution:
        if context.cache is not None:  # of a fixed count: mixing over sequences would let later tokens in
            f = context.cache.slot_an_evaluation(lambda y: self.attractor(y, y0, context))
            return solve(f, self._beginning(y0, context), replace(solver, mixing="token"))

        def restrict(rows: Tensor) -> Map:  # the map on some sequences only
            part, its_context = y0[rows], context.rows(rows)
            return lambda y: self.attractor(y, part, its_context)

        return solve(lambda y: self.attractor(y, y0, context), self._beginning(y0, context), solver, restrict, self.tokens)

    def _beginning(self, y0: Tensor, context: Context) -> Tensor:
        """The first state: the proposal, zero, or noise of the embedding's first std."""
        if self.begin == "proposal":
            return y0
        if self.begin == "zero":
            return torch.zeros_like(y0)
        return self.tokens.own(first_noise(context, seeds_of(context.tokens), y0.shape[2], self.std, y0))
