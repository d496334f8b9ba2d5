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

Shapes: y [b, s, w]; b sequences are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import SolverConfig

Map = Callable[[Tensor], Tensor]
_TINY = 1e-30


@dataclass
class Solution:
    """What a solve found, by sequence. `evaluations` counts sequence-evaluations that were computed, wanted or not."""

    state: Tensor
    """[b, s, w], at least fp32."""
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


def relative_residual(change: Tensor, y: Tensor, stop: str = "norm") -> Tensor:
    """||change|| / ||y|| of each sequence [b], or the largest of its tokens' with stop = "max_token"."""
    if stop == "max_token":
        return token_residual(change, y).amax(dim=-1)
    return change.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).clamp_min(_TINY)


def token_residual(change: Tensor, y: Tensor) -> Tensor:
    """||change|| / ||y|| of each token [b, s]."""
    return change.norm(dim=-1) / y.norm(dim=-1).clamp_min(_TINY)


class _Mixer:
    """The next point from the last evaluations: plain, or Anderson with its stored differences."""

    def __init__(self, config: SolverConfig) -> None:
        self.damping, self.ridge = config.damping, config.ridge
        self.history = config.history if config.method == "anderson" else 0
        self.over = (-2, -1) if config.mixing == "sequence" else (-1,)
        self.previous: tuple[Tensor, Tensor, Tensor] | None = None  # value, change, ||change||^2 of the mixing unit
        self.differences: list[tuple[Tensor, Tensor]] = []  # (dF, dR), newest first
        self.fallbacks: Tensor | None = None

    def fallbacks_on(self, device: torch.device) -> Tensor:
        """The count as a scalar there; nothing is copied from the host."""
        return torch.zeros((), dtype=torch.int64, device=device) if self.fallbacks is None else self.fallbacks

    def select(self, rows: Tensor) -> None:
        """Keep only some sequences."""
        if self.previous is not None:
            value, change, size = self.previous
            self.previous = value[rows], change[rows], size[rows]
        self.differences = [(dvalue[rows], dchange[rows]) for dvalue, dchange in self.differences]

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(self.over, keepdim=True)

    def next(self, y: Tensor, value: Tensor, change: Tensor) -> Tensor:
        plain = value if self.damping == 1 else torch.lerp(y, value, self.damping)
        if not self.history:
            return plain
        size = self._dot(change, change)
        if self.previous is None:
            self.previous = value, change, size
            return plain
        old_value, old_change, old_size = self.previous
        self.previous = value, change, size
        self.differences = [(value - old_value, change - old_change), *self.differences][: self.history]
        gammas = self._coefficients(change)
        bad = size > old_size
        for gamma in gammas:
            bad = bad | ~gamma.isfinite()
        self.fallbacks = bad.sum() if self.fallbacks is None else self.fallbacks + bad.sum()
        mixed = plain
        for (dvalue, dchange), gamma in zip(self.differences, gammas, strict=True):
            direction = dvalue if self.damping == 1 else dvalue - (1 - self.damping) * dchange
            mixed = torch.addcmul(mixed, gamma, direction, value=-1)
        return torch.where(bad, plain, mixed)

    def _coefficients(self, change: Tensor) -> list[Tensor]:
        """gamma of min ||change - sum_j gamma_j dR_j||^2, by LDL^T of the Gram matrix; a pivot never falls below its ridge."""
        columns = [dchange for _, dchange in self.differences]
        lower: list[list[Tensor]] = []
        pivots: list[Tensor] = []
        forward: list[Tensor] = []
        for i, column in enumerate(columns):
            row: list[Tensor] = []
            norm = self._dot(column, column)
            pivot, right = norm, self._dot(column, change)
            for j in range(i):
                inner = self._dot(column, columns[j])
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
        return gammas


def _evaluate(f: Map, y: Tensor) -> tuple[Tensor, Tensor]:
    value = f(y).to(y.dtype)
    return value, value - y


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


@torch.no_grad()
def solve(f: Map, start: Tensor, config: SolverConfig, restrict: Callable[[Tensor], Map] | None = None) -> Solution:
    """The fixed point of f from start [b, s, w].

    restrict(rows) gives f on some sequences of the batch (rows: int64 indices into start): with it, and `compaction`, those
    that have converged stop costing compute. Results differ from the uncompacted solve by no more than f's own rounding.
    """
    y = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    return _solve_fixed(f, y, config) if config.fixed else _solve_adaptive(f, y, config, restrict)


def _solve_fixed(f: Map, y: Tensor, config: SolverConfig) -> Solution:
    mixer, batch = _Mixer(config), y.shape[0]
    for iteration in range(config.max_iterations):
        value, change = _evaluate(f, y)
        if iteration + 1 < config.max_iterations:
            y = mixer.next(y, value, change)
    residual = relative_residual(change, y, config.stop)
    counts = torch.full((batch,), config.max_iterations, device=y.device)
    fallbacks = mixer.fallbacks_on(y.device)
    return Solution(value, residual, counts, residual < config.tolerance, batch * config.max_iterations, fallbacks)


def _solve_adaptive(f: Map, y: Tensor, config: SolverConfig, restrict: Callable[[Tensor], Map] | None) -> Solution:
    batch, device, mixer = y.shape[0], y.device, _Mixer(config)
    best, state = [float("inf")] * batch, y.clone()
    iterations, lows = [0] * batch, [0] * batch  # evaluations taken, and taken when the residual was lowest
    converged, stopped = [False] * batch, [False] * batch
    active = list(range(batch))  # sequences still being evaluated, in the order of y's rows
    evaluations = 0
    for iteration in range(1, config.max_iterations + 1):
        value, change = _evaluate(f, y)
        evaluations += len(active)
        residuals = relative_residual(change, y, config.stop).tolist()  # the one read of the iteration
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


@torch.no_grad()
def solve_strict(f: Map, start: Tensor, config: SolverConfig) -> Solution:
    """The fixed point as generation with a cache finds it, within the tolerance: a token is done once its own residual is below
    tolerance and every token before it is done, and is frozen from then on. So no output depends on when later tokens converge.

    Every position must be evaluated until the last is done: for evaluation, not for training.
    """
    y = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    mixer, batch = _Mixer(replace(config, mixing="token")), y.shape[0]  # over sequences, later tokens would enter
    done = torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
    state, iterations = y, torch.zeros(batch, dtype=torch.int64, device=y.device)
    for iteration in range(1, config.max_iterations + 1):
        value, change = _evaluate(f, y)
        state = torch.where(done[..., None], state, value)
        iterations += ~done.all(dim=-1)
        residual = token_residual(change, y)
        if iteration >= config.min_iterations:
            done = done | ((residual < config.tolerance).cummin(dim=-1).values)
        if iteration == config.max_iterations or bool(done.all()):
            break
        y = torch.where(done[..., None], state, mixer.next(y, value, change))
    fallbacks = mixer.fallbacks_on(y.device)
    return Solution(state, residual.amax(dim=-1), iterations, done.all(dim=-1), iteration * batch, fallbacks)
