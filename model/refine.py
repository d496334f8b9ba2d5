"""From proposal to equilibrium: solve y* = f(y*, y0), then make it differentiable.

`Refine` is the one module that contains the loop. An engine that gathers parameters on demand (ZeRO-3) treats it as a leaf:
its parameters are gathered once a solve, and ranks may take different numbers of iterations.

Under tensor parallelism the state, its residuals and Anderson's history are this rank's tokens, whatever the backbone does: f gathers
them on the way into its matrices and scatters its sums on the way out, which together carry the bytes of the all-reduce they replace.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Context
from model.attractor import Attractor
from model.config import ModelConfig, SolverConfig
from model.fixed_point import Map, Solution, solve, solve_strict
from model.implicit import attach
from model.layers import Layers

Depth = int | str
"""How far to solve: a number of evaluations, "auto" (as configured) or "strict" (as generation with a cache would)."""


class Refined(NamedTuple):
    output: Tensor
    """[b, s, w] (this rank's tokens), at least fp32: the equilibrium, differentiable when gradients are on."""
    solution: Solution | None
    penalty: Tensor | None
    products: Tensor | None
    """See model.implicit.Attached; None without gradients."""


class Refine(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, recompute: bool = False) -> None:
        super().__init__()
        self.divide, divided = layers.divide, layers.divided()
        self.tokens = divided.tokens
        self.attractor = Attractor(config.model, config.attractor, divided)
        self.solver, self.gradient, self.recompute = config.solver, config.gradient, recompute

    def forward(self, proposal: Tensor, context: Context, depth: Depth = "auto") -> Refined:
        """proposal y0 [b, s, w] in any precision.

        With gradients on, the output is differentiable and one application deeper than the solve. With gradients off, it is
        the state after `depth`; depth 0 is the proposal itself, with no solution.
        """
        y0 = self.start(proposal)
        if not torch.is_grad_enabled():
            state, solution = self._at_depth(y0, context, depth)
            return Refined(state, solution, None, None)
        solution = self._solve(y0.detach(), context, self.solver)
        attached = attach(lambda y: self.attractor(y, y0, context), solution.state, self.gradient, self.solver, self.recompute, self.tokens)
        return Refined(attached.output, solution, attached.penalty, attached.products)

    def start(self, proposal: Tensor) -> Tensor:
        """y0: this rank's tokens of the proposal, in the solver's precision."""
        return self.divide(proposal).to(torch.promote_types(proposal.dtype, torch.float32))

    def _at_depth(self, y0: Tensor, context: Context, depth: Depth) -> tuple[Tensor, Solution | None]:
        if depth == 0:
            return y0, None
        if depth == "strict":
            solution = solve_strict(lambda y: self.attractor(y, y0, context), y0, self.solver, self.tokens)
        elif depth == "auto":
            solution = self._solve(y0, context, self.solver)
        else:
            solution = self._solve(y0, context, replace(self.solver, min_iterations=int(depth), max_iterations=int(depth)))
        return solution.state, solution

    def _solve(self, y0: Tensor, context: Context, solver: SolverConfig) -> Solution:
        def restrict(rows: Tensor) -> Map:  # the map on some sequences only
            part, its_context = y0[rows], context.rows(rows)
            return lambda y: self.attractor(y, part, its_context)

        return solve(lambda y: self.attractor(y, y0, context), y0, solver, restrict, self.tokens)
