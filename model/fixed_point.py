"""Fixed points y* = f(y*) of any map, by plain (Picard) iteration or Anderson mixing. Knows no model and no gradient.

    residual      r(y) = f(y) - y;   a sequence has converged when ||r|| / ||y|| < tolerance
    picard        y <- y + beta r(y)
    anderson      y <- f - dF gamma - (1 - beta)(r - dR gamma),   gamma = argmin ||r - dR gamma||

dF, dR are the last `history` differences of values and residuals (type II; Walker & Ni 2011). The least-squares problem is
solved per token, or per sequence with `mixing = "sequence"`. Per token it is causal: nothing a later token does can reach an
earlier one through gamma. Per sequence it is not: see docs/design.md for how much leaks. gamma comes from an LDL^T elimination
written out over the few differences, so it is a closed form of elementwise operations whatever the history.

An iteration is one evaluation of f, and the first already counts. The state returned is f at the last point evaluated, so a
solve of n evaluations of a plain iteration returns f^n(start). With a fixed count nothing is read back from the device; with
adaptive stopping there is one read an iteration. State, residuals and mixing are at least fp32, whatever f computes in.

Contained, per token or sequence: an Anderson step that is not finite, or that follows a step which raised the residual, is
replaced by the plain one and counted. A sequence that does not converge, because it ran out of iterations or because its
residual set no new low for `patience` evaluations (a map that rounds to bf16 bottoms out near 1e-3), returns the value with
its smallest residual.

The tokens of a sequence may be divided over ranks (`Tokens`): then y is this rank's part, [b, s / ranks, w], and so are history
and mixing. What is asked of a whole sequence, its residual, its Gram matrix, is summed over the ranks: one small reduction an
iteration, whose result is the same on all of them, so that ranks that communicate inside f stop together whatever they hold.

Shapes: y [b, s, w]; b sequences are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import SolverConfig

Map = Callable[[Tensor], Tensor]
_TINY = 1e-30


class Tokens(Protocol):
    """How the tokens of each sequence are divided over ranks, as far as a solver must know."""

    ranks: int

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; its gradient is each rank's own. x is used up."""
        ...

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of x over the ranks. x is used up."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """[b, s / ranks] of this rank -> [b, s]."""
        ...

    def own(self, x: Tensor) -> Tensor:
        """[b, s] -> [b, s / ranks] of this rank."""
        ...


class Undivided:
    """Every token is here."""

    ranks = 1

    def total(self, x: Tensor) -> Tensor:
        return x

    highest = whole = own = total


UNDIVIDED = Undivided()


@dataclass
class Solution:
    """What a solve found, by sequence. `evaluations` counts sequence-evaluations that were computed, wanted or not."""

    state: Tensor
    """[b, s, w] (this rank's tokens), at least fp32."""
    residual: Tensor
    """[b], relative, at the last point evaluated (of a sequence that did not converge: the smallest met)."""
    iterations: Tensor
    """[b] int64: evaluations until the sequence stopped."""
    converged: Tensor
    """[b] bool."""
    evaluations: int
    """Sum over iterations of the sequences evaluated; divided by b, the cost of the solve in applications of f."""
    fallbacks: Tensor
    """Scalar int64: Anderson steps replaced by plain ones (tokens or sequences, as the mixing)."""


def relative_residual(change: Tensor, y: Tensor, stop: str = "norm", tokens: Tokens = UNDIVIDED) -> Tensor:
    """||change|| / ||y|| of each sequence [b], or the largest of its tokens' with stop = "max_token"; the same on all ranks."""
    if stop == "max_token":
        largest = token_residual(change, y).amax(dim=-1)
        if tokens.ranks > 1:  # a maximum over ranks may lose a NaN
            largest = largest.nan_to_num(nan=float("inf"), posinf=float("inf"))
        return tokens.highest(largest)
    of_change, of_y = change.flatten(1).norm(dim=1), y.flatten(1).norm(dim=1)
    if tokens.ranks > 1:
        of_change, of_y = tokens.total(torch.stack((of_change, of_y)).square()).sqrt()
    return of_change / of_y.clamp_min(_TINY)


def token_residual(change: Tensor, y: Tensor) -> Tensor:
    """||change|| / ||y|| of each token [b, s]."""
    return change.norm(dim=-1) / y.norm(dim=-1).clamp_min(_TINY)


class Mixer:
    """The next point from the last evaluations: plain, or Anderson with its stored differences."""

    def __init__(self, config: SolverConfig, tokens: Tokens) -> None:
        self.tokens = tokens
        self.damping, self.ridge = config.damping, config.ridge
        self.history = config.history if config.method == "anderson" else 0
        self.over = (-2, -1) if config.mixing == "sequence" else (-1,)
        self.previous: tuple[Tensor, Tensor, Tensor] | None = None  # value, change, ||change||^2 of the mixing unit
        self.differences: list[tuple[Tensor, Tensor]] = []  # (dF, dR), newest first
        self.fallbacks: Tensor | None = None

    def fallbacks_on(self, device: torch.device) -> Tensor:
        """The count as a scalar there; nothing is copied from the host."""
        if self.fallbacks is None:
            return torch.zeros((), dtype=torch.int64, device=device)
        return self.fallbacks if self.over == (-2, -1) else self.tokens.total(self.fallbacks.clone())

    def select(self, rows: Tensor) -> None:
        """Keep only some sequences."""
        if self.previous is not None:
            value, change, size = self.previous
            self.previous = value[rows], change[rows], size[rows]
        self.differences = [(dvalue[rows], dchange[rows]) for dvalue, dchange in self.differences]

    def _dots(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        """The inner product of each pair over the mixing unit; of whole sequences, over all ranks in one reduction."""
        own = [(a * b).sum(self.over, keepdim=True) for a, b in pairs]
        if self.tokens.ranks == 1 or self.over == (-1,):
            return own
        return self.tokens.total(torch.stack(own)).unbind()

    def next(self, y: Tensor, value: Tensor, change: Tensor) -> Tensor:
        plain = value if self.damping == 1 else torch.lerp(y, value, self.damping)
        if not self.history:
            return plain
        if self.previous is None:
            self.previous = value, change, self._dots([(change, change)])[0]
            return plain
        old_value, old_change, old_size = self.previous
        self.differences = [(value - old_value, change - old_change), *self.differences][: self.history]
        size, gammas = self._coefficients(change)
        self.previous = value, change, size
        bad = size > old_size
        for gamma in gammas:
            bad = bad | ~gamma.isfinite()
        self.fallbacks = bad.sum() if self.fallbacks is None else self.fallbacks + bad.sum()
        mixed = plain
        for (dvalue, dchange), gamma in zip(self.differences, gammas, strict=True):
            direction = dvalue if self.damping == 1 else dvalue - (1 - self.damping) * dchange
            mixed = torch.addcmul(mixed, gamma, direction, value=-1)
        return torch.where(bad, plain, mixed)

    def _coefficients(self, change: Tensor) -> tuple[Tensor, list[Tensor]]:
        """||change||^2, and gamma of min ||change - sum_j gamma_j dR_j||^2, by LDL^T of the Gram matrix; a pivot never falls below
        its ridge."""
        columns = [dchange for _, dchange in self.differences]
        pairs = [(column, other) for i, column in enumerate(columns) for other in (*columns[: i + 1], change)]
        *dots, size = self._dots([*pairs, (change, change)])
        gram = iter(dots)  # of each column: with those before it, with itself, with the change
        lower: list[list[Tensor]] = []
        pivots: list[Tensor] = []
        forward: list[Tensor] = []
        for i in range(len(columns)):
            row: list[Tensor] = []
            inners = [next(gram) for _ in range(i)]
            norm = next(gram)
            pivot, right = norm, next(gram)
            for j in range(i):
                inner = inners[j]
                for k in range(j):
                    inner = inner - row[k] * pivots[k] * lower[j][k]
                row.append(inner / pivots[j])
                pivot = pivot - row[j] * inner
                right = right - row[j] * forward[j]
            lower.append(row)
            pivots.append(torch.maximum(pivot, self.ridge * norm) + _TINY)
            forward.append(right)
        gammas = [right / pivot for right, pivot in zip(forward, pivots, strict=True)]
        for i in reversed(range(len(gammas))):
            for j in range(i):
                gammas[j] = gammas[j] - lower[i][j] * gammas[i]
        return size, gammas


def evaluate(f: Map, y: Tensor) -> tuple[Tensor, Tensor]:
    """(f(y), f(y) - y) in y's precision."""
    value = f(y).to(y.dtype)
    return value, value - y


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


@torch.no_grad()
def solve(
    f: Map, start: Tensor, config: SolverConfig, restrict: Callable[[Tensor], Map] | None = None, tokens: Tokens = UNDIVIDED
) -> Solution:
    """The fixed point of f from start [b, s, w]. Collective over the ranks of `tokens`.

    restrict(rows) gives f on some sequences of the batch (rows: int64 indices into start): with it, and `compaction`, those
    that have converged stop costing compute. Results differ from the uncompacted solve by no more than f's own rounding.
    """
    y = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    return _solve_fixed(f, y, config, tokens) if config.fixed else _solve_adaptive(f, y, config, restrict, tokens)


def _solve_fixed(f: Map, y: Tensor, config: SolverConfig, tokens: Tokens) -> Solution:
    mixer, batch = Mixer(config, tokens), y.shape[0]
    for iteration in range(config.max_iterations):
        value, change = evaluate(f, y)
        if iteration + 1 < config.max_iterations:
            y = mixer.next(y, value, change)
    residual = relative_residual(change, y, config.stop, tokens)
    counts = torch.full((batch,), config.max_iterations, device=y.device)
    fallbacks = mixer.fallbacks_on(y.device)
    return Solution(value, residual, counts, residual < config.tolerance, batch * config.max_iterations, fallbacks)


def _solve_adaptive(f: Map, y: Tensor, config: SolverConfig, restrict: Callable[[Tensor], Map] | None, tokens: Tokens) -> Solution:
    batch, device, mixer = y.shape[0], y.device, Mixer(config, tokens)
    best, state = [float("inf")] * batch, y.clone()
    iterations, lows = [0] * batch, [0] * batch  # evaluations taken, and taken when the residual was lowest
    converged, stopped = [False] * batch, [False] * batch
    active = list(range(batch))  # sequences still being evaluated, in the order of y's rows
    evaluations = 0
    for iteration in range(1, config.max_iterations + 1):
        value, change = evaluate(f, y)
        evaluations += len(active)
        residuals = relative_residual(change, y, config.stop, tokens).tolist()  # the one read of the iteration
        improved = []
        for row, (sequence, residual) in enumerate(zip(active, residuals, strict=True)):
            if stopped[sequence]:
                continue
            iterations[sequence] = iteration
            if residual < best[sequence]:
                best[sequence], lows[sequence] = residual, iteration
                improved.append(row)
            if iteration >= config.min_iterations:
                converged[sequence] = residual < config.tolerance
                stopped[sequence] = converged[sequence] or iteration - lows[sequence] >= config.patience
        if len(improved) == batch:
            state = value
        elif improved:
            state = state.index_copy(0, _index([active[row] for row in improved], device), value[_index(improved, device)])
        remaining = [row for row, sequence in enumerate(active) if not stopped[sequence]]
        if not remaining or iteration == config.max_iterations:
            break
        y = mixer.next(y, value, change)
        if restrict is not None and config.compaction and len(remaining) < len(active):
            active = [active[row] for row in remaining]
            rows = _index(remaining, device)
            y = y[rows]
            mixer.select(rows)
            f = restrict(_index(active, device))
    return Solution(
        state,
        torch.tensor(best, device=device),
        torch.tensor(iterations, device=device),
        torch.tensor(converged, device=device),
        evaluations,
        mixer.fallbacks_on(device),
    )
