"""Fixed points token by token, as a model in use must find them: no output depends on later tokens, on padding or on the batch.

    a token has settled    once ||r|| / ||y|| < tolerance; or, when its residual set no new low for `patience` evaluations, with the value
                           of its smallest one (a map that rounds to bf16 bottoms out near 1e-3, above the tolerance)
    a token is done        once it and all before it have settled; it is frozen from then on
    it begins anew         where it is not done and its residual, once below tolerance, is above 4 tolerance: those before it moved it

Settled is remembered: near the rounding of bf16 a residual rises and falls at random, and of many tokens some one is always just above the
tolerance or at a new low; waiting for all at the same evaluation took 64 where 18 do (prompts of 250 tokens, tolerance 3e-4).

f is causal, so a token's value is a function of the tokens up to it alone; Anderson mixing is per token whatever is configured: over
sequences, later tokens would enter. Hence what is returned for a token is what generation with a cache computes (model/cache.py), within
the tolerance: there, the tokens before it are done before it is begun.

Tokens may be done from the start: padding on the right, which costs compute alone. Every position is evaluated until the last is done: for
evaluation and generation, not for training. Shapes: y [b, s, w]; done [b, s]; one read from the device an evaluation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.config import SolverConfig
from model.fixed_point import UNDIVIDED, Map, Mixer, Solution, Tokens, evaluate, solve, token_residual


@torch.no_grad()
def solve_strict(f: Map, start: Tensor, config: SolverConfig, tokens: Tokens = UNDIVIDED, done: Tensor | None = None) -> Solution:
    """The fixed point of f from start [b, s, w]; collective over the ranks of `tokens`.

    done [b, s] bool (all tokens, on every rank) are not solved for: their state is their start. It is updated in place before every
    evaluation, so that f can see which tokens still change. The residual of the solution is the largest of its tokens'.
    """
    config = replace(config, mixing="token", stop="norm")
    y = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    mixer, batch, length = Mixer(config, tokens), y.shape[0], y.shape[1] * tokens.ranks
    if done is None:
        if batch * length == 1:  # a token alone is a sequence, and what is done needs no mask
            return solve(f, y, config, tokens=tokens)
        done = torch.zeros(batch, length, dtype=torch.bool, device=y.device)
    low = torch.zeros(batch, length, device=y.device, dtype=y.dtype).masked_fill_(~done, float("inf"))  # the residual of the value kept
    found_at = torch.zeros(batch, length, dtype=torch.int64, device=y.device)  # and the evaluation that gave it
    settled = done.clone()
    state, iterations = y, torch.zeros(batch, dtype=torch.int64, device=y.device)
    for iteration in range(1, config.max_iterations + 1):
        value, change = evaluate(f, y)
        iterations += ~(done if length == 1 else done.all(dim=-1, keepdim=True))[:, 0]
        residual = tokens.whole(token_residual(change, y))
        moved = (low < config.tolerance) & (residual > 4 * config.tolerance) & ~done
        settled, low = settled & ~moved, low.masked_fill(moved, float("inf"))
        within = residual < config.tolerance
        keep = (within | (residual < low)) & ~done
        low, found_at = torch.where(keep, residual, low), found_at.masked_fill(keep, iteration)
        state = torch.where(tokens.own(keep)[..., None], value, state)
        if iteration >= config.min_iterations:
            settled = settled | within | (found_at <= iteration - config.patience)
            done |= settled if length == 1 else settled.cummin(dim=-1).values
            if bool(done.all()):
                break
        if iteration < config.max_iterations:
            y = torch.where(tokens.own(done)[..., None], state, mixer.next(y, value, change))
    largest = low.amax(dim=-1)
    return Solution(state, largest, iterations, largest < config.tolerance, iteration * batch, mixer.fallbacks_on(y.device))
