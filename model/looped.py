"""Blocks applied again and again: Parcae (arXiv 2604.12946) and the looped Transformer. No equilibrium is looked for.

    parcae    h <- core(a h + dt B e),   a = exp(-dt exp(A_log)),   dt = softplus(dt_bias),   e = norm(prelude);   out = coda(C h)
              h starts from noise, std sqrt(2 / (5 w)). In training each sequence has its own count, max(1, Poisson(loop.iterations)),
              and gradients pass through its last loop.backprop iterations; evaluation takes loop.iterations, or as many as asked.
    looped    h <- core(h + e),   e = prelude;   out = coda(h)
              h starts from zero, loop.iterations times, gradients through all of them.

a, dt are diagonal and 0 <= a < 1 in arithmetic whatever their parameters, so the injection is a contraction. Sequences end together:
one with fewer iterations joins later, so that the last ones, those with gradients, are the same for all, and no iteration is computed
for a sequence that does not want it. B e and value embeddings do not change from one iteration to the next, and are computed once.
Shapes: e, h [b, s, w] (this rank's tokens), in the precision of the weights. Source: arXiv 2604.12946, and the Parcae of arXiv
2605.12466's code, from which the starting values are: A_log = 0, a = sqrt(1/5), B the identity.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Context
from model.backbone import Backbone
from model.config import ModelConfig
from model.fixed_point import Solution, relative_residual
from model.layers import Layers, RMSNorm
from model.noise import first_noise, poisson_counts, seeds_of
from model.refine import Depth, Refined

_FIRST_DECAY = math.sqrt(1 / 5)
_LARGEST_LOG_RATE = 10.0  # exp(-exp(10)) is 0 in every precision


class DiagonalInjection(nn.Module):
    """a h + dt B e with diagonal a, dt [w] and a matrix B [w, w]."""

    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.decay_log = nn.Parameter(torch.empty(width))
        self.step_bias = nn.Parameter(torch.empty(width))
        self.input = layers.replicated(width, width)
        self.shared = layers.shared
        self.reset()

    def reset(self) -> None:
        """First values of the diagonal: a = sqrt(1/5) with exp(A_log) = 1, so dt = -log a."""
        nn.init.zeros_(self.decay_log)
        nn.init.constant_(self.step_bias, math.log(math.expm1(-math.log(_FIRST_DECAY))))

    def decay(self, dtype: torch.dtype) -> Tensor:
        """a [w], 0 <= a < 1 in that precision; its gradient is the unrounded number's, so that no channel is stuck at the bound."""
        bias, log = self.shared(self._wide(self.step_bias)), self.shared(self._wide(self.decay_log))
        log_step = torch.where(bias < -15, bias, F.softplus(bias.clamp_min(-15)).log())  # log softplus(x) is x far below 0
        rate = (log + log_step).clamp_max(_LARGEST_LOG_RATE).exp()
        exact = torch.exp(-rate)
        bounded = exact.detach().to(dtype).clamp_max(1 - torch.finfo(dtype).eps / 2)
        return bounded + (exact - exact.detach()).to(dtype)

    def drive(self, e: Tensor) -> Tensor:
        """dt B e [b, s, w]."""
        step = F.softplus(self.shared(self._wide(self.step_bias)))
        return self.input(e) * step.to(e.dtype)

    @staticmethod
    def _wide(parameter: Tensor) -> Tensor:
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class Loop(nn.Module):
    """From the prelude's output to what the final norm reads. To ZeRO-3 it is a leaf, as Refine is: ranks may loop differently often."""

    def __init__(self, config: ModelConfig, layers: Layers, recompute: bool = False) -> None:
        super().__init__()
        m, loop, first = config.model, config.loop, config.prelude
        parcae = m.kind == "parcae"
        self.mean, self.tolerance, self.tokens = loop.iterations, config.solver.tolerance, layers.tokens
        self.backprop = loop.backprop if parcae else None
        self.draws = parcae
        """Whether training draws each sequence's count."""
        self.std = math.sqrt(2 / (5 * m.width))
        self.norm = RMSNorm(m.width, m.norm_eps, layers) if parcae else None
        self.injection = DiagonalInjection(m.width, layers) if parcae else None
        self.core = Backbone(m, layers, range(first, first + loop.core), recompute)
        self.readout = layers.replicated(m.width, m.width) if parcae else None
        self.coda = Backbone(m, layers, range(first + loop.core, m.backbone_layers), recompute)

    def forward(self, proposal: Tensor, context: Context, depth: Depth = "auto") -> Refined:
        """proposal [b, s, w]: the prelude's output. With gradients on, counts are drawn (parcae) and the output is differentiable; with
        gradients off every sequence takes `depth` iterations ("auto" and "strict": loop.iterations)."""
        e = proposal if self.norm is None else self.norm(proposal)
        seeds = [] if self.injection is None else seeds_of(context.tokens)
        counts = [self.mean if isinstance(depth, str) else depth] * len(e)
        if torch.is_grad_enabled() and self.draws:
            counts = poisson_counts(seeds, self.mean)
        order = sorted(range(len(e)), key=lambda row: -counts[row])
        back = None
        if counts != [counts[row] for row in order]:
            rows = torch.tensor(order, device=e.device)
            e, context, seeds, back = e[rows], context.rows(rows), [seeds[row] for row in order], torch.argsort(rows)
        state, solution, applications = self._run(e, context, seeds, [counts[row] for row in order])
        if back is not None:
            state, solution = state[back], _in_order(solution, back)
            context = context.rows(back)
        out = state if self.readout is None else self.readout(state)
        return Refined(self.coda(out, context), solution, applications=applications)

    def _run(self, e: Tensor, context: Context, seeds: list[int], counts: list[int]) -> tuple[Tensor, Solution, float]:
        """(h, what the loop did, iterations a sequence with gradients) for sequences in the order of falling counts."""
        state, drive, decay = self._start(e, context, seeds)
        core = self.core if context.cache is None else context.cache.slot_an_evaluation(self.core)
        values = self.core.values(context)
        residual = torch.zeros(len(e), device=e.device)
        backprop = 0 if not torch.is_grad_enabled() else counts[0] if self.backprop is None else self.backprop
        plain = applied = 0
        for left in range(counts[0], 0, -1):  # iterations to go, this one included
            active = sum(count >= left for count in counts)
            part, learns = slice(0, active), left <= backprop
            with nullcontext() if learns else torch.no_grad():
                inputs = drive[part] + (state[part] if decay is None else state[part] * decay)
                among = context if active == len(e) else context.rows(part)
                reached = core(inputs, among, [_of(value, part, learns) for value in values])
                if left == 1:
                    old = state[part].detach()
                    residual[part] = relative_residual((reached.detach() - old).float(), old.float(), "norm", self.tokens)
                state = reached if active == len(e) else torch.cat((reached, state[active:]))
            plain, applied = (plain, applied + active) if learns else (plain + active, applied)
        iterations = torch.tensor(counts, device=e.device)
        none = torch.zeros((), dtype=torch.int64, device=e.device)
        return state, Solution(state.detach(), residual, iterations, residual < self.tolerance, plain, none), applied / len(e)

    def _start(self, e: Tensor, context: Context, seeds: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(h at the start, what each iteration adds to it, what it multiplies it by)."""
        if self.injection is None:
            return torch.zeros_like(e), e, None
        return self.tokens.own(first_noise(context, seeds, e.shape[2], self.std, e)), self.injection.drive(e), self.injection.decay(e.dtype)


def _of(value: Tensor | None, part: slice, learns: bool) -> Tensor | None:
    """Some sequences' value embeddings; a view taken without gradients would still ask for one."""
    if value is None:
        return None
    return value[part] if learns else value.detach()[part]


def _in_order(solution: Solution, index: Tensor) -> Solution:
    """What it tells of each sequence, in another order."""
    told = {name: getattr(solution, name)[index] for name in ("state", "residual", "iterations", "converged")}
    return replace(solution, **told)
