"""Kinds of solver side by side on a trained model: evaluations, seconds, loss, and what later tokens leak into earlier ones.

    leak = max over sequences of ||y*(x)[:k] - y*(x')[:k]|| / ||y*(x)[:k]||,    x' = x with its tokens from k = 3/4 s on replaced

The state of the first three quarters should not know what follows. Per-token mixing and plain iteration leak only through the number of
evaluations, which the sequence decides (within the tolerance); whole-sequence mixing leaks through its coefficients as well;
`strict` leaks nothing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.fixed_point import relative_residual
from model.language_model import LanguageModel
from model.loss import IGNORE
from model.refine import Depth, Refine
from pretrain.errors import Refusal
from pretrain.evaluate import validation_loader
from pretrain.runtime import device_of, settle_libraries

CHOICES: dict[str, tuple[dict[str, Any], Depth]] = {
    "plain": ({"method": "picard"}, "auto"),
    "anderson, token, history 1": ({"method": "anderson", "mixing": "token", "history": 1}, "auto"),
    "anderson, token, history 2": ({"method": "anderson", "mixing": "token", "history": 2}, "auto"),
    "anderson, token, history 4": ({"method": "anderson", "mixing": "token", "history": 4}, "auto"),
    "anderson, sequence, history 4": ({"method": "anderson", "mixing": "sequence", "history": 4}, "auto"),
    "strict, token, history 2": ({"method": "anderson", "mixing": "token", "history": 2}, "strict"),
}


def compare_solvers(run: Path, batches: int = 4) -> list[dict[str, Any]]:
    """One row for each kind of solver, on the first validation batches of a run's newest checkpoint. Raises Refusal."""
    settle_libraries(device_of("auto"))
    from pretrain.loaded import load_run

    loaded = load_run(run)
    if not isinstance(loaded.model.refine, Refine):
        raise Refusal(f"{run} holds a model of kind {loaded.recipe.model.kind}: it has no solver to compare.")
    data = [
        (batch.tokens.to(loaded.device), batch.targets.to(loaded.device))
        for batch in islice(validation_loader(loaded.recipe, 0, 1, None), batches)
    ]
    rows = []
    for name, (changes, depth) in CHOICES.items():
        loaded.model.refine.solver = replace(loaded.recipe.solver, **changes)
        rows.append({"solver": name, **_measure(loaded.model, data, depth)})
    return rows


@torch.no_grad()
def _measure(model: LanguageModel, data: list[tuple[Tensor, Tensor]], depth: Depth) -> dict[str, Any]:
    _solve(model, data[0][0], depth)  # so that the first timed one is like the others
    seconds, evaluations, nll, predicted, sequences, leak = 0.0, 0.0, 0.0, 0, 0, 0.0
    for tokens, targets in data:
        state, iterations, elapsed = _solve(model, tokens, depth)
        seconds += elapsed
        evaluations += iterations
        sequences += len(tokens)
        losses = model.layers.cross_entropy_tokens(model.norm(state).flatten(0, 1), model.unembedding, targets.flatten())
        nll, predicted = nll + float(losses.sum()), predicted + int((targets != IGNORE).sum())
        kept = tokens.shape[1] * 3 // 4
        other = tokens.clone()
        other[:, kept:] = tokens.roll(1, 0)[:, kept:]
        early = state[:, :kept]
        leak = max(leak, float(relative_residual(_solve(model, other, depth)[0][:, :kept] - early, early).max()))
    return {"evaluations": evaluations / sequences, "solve_seconds": seconds / len(data), "loss": nll / predicted, "leak": leak}


def _solve(model: LanguageModel, tokens: Tensor, depth: Depth) -> tuple[Tensor, float, float]:
    """(state, evaluations summed over sequences, seconds of the solve alone)."""
    assert isinstance(model.refine, Refine)
    proposal, context = model.propose(tokens, None)
    start = time.perf_counter()
    refined = model.refine(proposal, context, depth)
    assert refined.solution is not None
    iterations = float(refined.solution.iterations.sum())  # reads the device, so the clock stops after the work
    return refined.output, iterations, time.perf_counter() - start
