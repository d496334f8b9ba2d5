"""The Attractor reasoner: TRM's protocol with the loop over z solved as a fixed point (arXiv 2605.12466, code attractor_puzzles).

    outer_cycles times:   z* = net(z*, y + x) from the carried z;   z <- k more applications;   y <- net(y, z)

All cycles but the last run without gradient. In the last, the gradient of section `gradient` is attached at z* (phantom-k: through its k
applications), and y's update is differentiated. As published, k applications follow the solve in every cycle.

solve=yz: the map is one whole cycle on the stacked state [y; z], [b, 2 L, w]:

    f([y; z]) = [net(y, z'); z'],   z' = inner_cycles applications of net(., y + x) to z

solved once from the carried latents, outer_cycles being what the solver does; phantom-k differentiates k cycles.

Where this departs from the published code, and why. Its solver rolls a buffer of zeros into the least-squares problem: an empty slot has
residual 0, so the mixture puts all weight on it, and evaluations 4 to 7 are spent at points next to the origin. On a linear map of norm
about .4 its 8 evaluations end 12 % off the equilibrium, where 8 plain ones end .1 % off; its training logs print relative residuals of 1.0
(5 evaluations) and 4.9 (8), and no convergence. It also returns the last point, not the map's value there, so the first of the k
applications repeats an evaluation. Here the solve is model/fixed_point's; `solver.start=zero` lets one begin where theirs often is.
Its Jacobian penalty is divided by the width, and by the global batch once more, which makes a weight of 1e-3 about 2.5e-9 of ours (it is
0 in the log of the 27M run); here it is section gradient's.

Path noise (the equilibrium variant) is drawn once a solve and held, in the phantom steps too: drawn at every evaluation it would leave
nothing to converge to. Partial steps change the path, not the equilibrium.

With `iterations` = n (evaluation alone) a solve is exactly n evaluations and nothing follows it: 0 leaves its state as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.config import GradientConfig, SolverConfig
from model.fixed_point import Map, Solution, solve
from model.implicit import Attached, attach
from model.reasoning.blocks import Network
from model.reasoning.config import ReasoningConfig
from model.reasoning.thinking import Asked, Latents, Thinking

Rows = Callable[[Tensor | slice], Map]
"""The map on some sequences of the batch."""
_ALL = slice(None)


class Attractor(nn.Module):
    latents = 2

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__()
        m = config.model
        self.network = Network(m)
        self.whole, self.inner = m.solve == "yz", m.inner_cycles
        self.outer = 1 if self.whole else m.outer_cycles
        self.solver, self.gradient = config.solver, config.gradient
        damping = config.gradient.damping if config.gradient.mode == "phantom" else 1.0
        self.following = GradientConfig("phantom", config.applications, damping)  # what follows a solve without gradient: the same steps

    def forward(self, latents: Latents, x: Tensor, asked: Asked) -> Thinking:
        y, z = latents
        solver = self._solver(asked.iterations)
        update = self._whole_cycle if self.whole else self._solved_cycle
        cost = self.inner + 1 if self.whole else 1  # applications of the network in one of the map
        solutions: list[Solution] = []
        differentiated = torch.is_grad_enabled()
        with torch.no_grad():
            for _ in range(self.outer - 1):
                y, z, _ = update(y, z, x, solver, asked, solutions)
        y, z, attached = update(y, z, x, solver, asked, solutions)
        rows = max(1, y.shape[0])
        searched = cost * sum(solution.evaluations for solution in solutions) / rows
        following = self.following.steps if asked.iterations is None else 0
        last = following * cost + (0 if self.whole else 1)
        evaluations = searched + (self.outer - 1 if differentiated else self.outer) * last
        penalty = None if attached is None else attached.penalty
        return Thinking(y, (y, z), evaluations, float(last) if differentiated else 0.0, _record(solutions), penalty)

    def _solver(self, iterations: int | None) -> SolverConfig | None:
        """The solver to use; None leaves the state as it is."""
        if iterations is None:
            return self.solver
        return replace(self.solver, min_iterations=iterations, max_iterations=iterations) if iterations else None

    def _solved_cycle(
        self, y: Tensor, z: Tensor, x: Tensor, solver: SolverConfig | None, asked: Asked, solutions: list[Solution]
    ) -> tuple[Tensor, Tensor, Attached | None]:
        injection, noise = y + x, asked.draw(z)

        def rows(which: Tensor | slice) -> Map:
            part, held, tables = injection[which], None if noise is None else noise[which], asked.tables
            return lambda state: self.network(state, part, tables, held)

        z, attached = self._equilibrium(rows, z, solver, asked, solutions)
        return self.network(y, z, asked.tables, asked.draw(y)), z, attached

    def _whole_cycle(
        self, y: Tensor, z: Tensor, x: Tensor, solver: SolverConfig | None, asked: Asked, solutions: list[Solution]
    ) -> tuple[Tensor, Tensor, Attached | None]:
        noise = asked.draw(torch.cat((y, z), dim=1))

        def rows(which: Tensor | slice) -> Map:
            part, held = x[which], (None, None) if noise is None else noise[which].chunk(2, dim=1)

            def cycle(state: Tensor) -> Tensor:
                y, z = state.chunk(2, dim=1)
                injection = (y + part).to(part.dtype)
                for _ in range(self.inner):
                    z = self.network(z, injection, asked.tables, held[1])
                y = self.network(y, z.to(part.dtype), asked.tables, held[0])
                return torch.cat((y, z), dim=1)

            return cycle

        state, attached = self._equilibrium(rows, torch.cat((y, z), dim=1), solver, asked, solutions)
        y, z = state.chunk(2, dim=1)
        return y, z, attached

    def _equilibrium(
        self, rows: Rows, start: Tensor, solver: SolverConfig | None, asked: Asked, solutions: list[Solution]
    ) -> tuple[Tensor, Attached | None]:
        """The solved state in the model's precision, differentiable where gradients are on; the solution is added to `solutions`."""
        if solver is None:
            return start, None
        f = rows(_ALL)
        begin = torch.zeros_like(start) if self.solver.start == "zero" else start
        solution = solve(f, begin, solver, rows)
        solutions.append(solution)
        state = solution.state
        if torch.is_grad_enabled():
            attached = attach(f, state, self.gradient, self.solver)
            return attached.output.to(start.dtype), attached
        if asked.iterations is None:
            state = attach(f, state, self.following, self.solver).output
        return state.to(start.dtype), None


def _record(solutions: list[Solution]) -> dict[str, Tensor]:
    """Scalars over the solves of a step: means over rows and solves, the worst residual, the sum of fallbacks."""
    if not solutions:
        return {}
    return {
        "solver_iterations": torch.cat([solution.iterations for solution in solutions]).float().mean(),
        "solver_residual": torch.cat([solution.residual for solution in solutions]).amax(),
        "solver_converged": torch.cat([solution.converged for solution in solutions]).float().mean(),
        "solver_fallbacks": torch.stack([solution.fallbacks for solution in solutions]).sum(),
    }
