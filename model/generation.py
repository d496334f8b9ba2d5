"""Text from a model, token by token: what is drawn from the logits, and the loop around `LanguageModel.extend`.

    temperature t   logits / t; 0 takes the most probable token
    top_k           of these, those no less than the k-th largest
    top_p           of these, renormalised, the fewest most probable ones whose probabilities reach p: a token stays while those above it
                    add up to less than p
    token           the first whose cumulative probability exceeds u ~ U[0, 1)

in float64, in the order of transformers' generate. Each row draws its u from a generator of its own, seeded with `seed` and the row's
number: what a row is given depends on no other row, nor on when one ends.

The device is read once a token, for what is handed out, and once an evaluation by an adaptive solve. Positions beyond the trained length
are only further rotations: nothing refuses them, and nothing was trained on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache import Cache
from model.language_model import LanguageModel
from model.refine import Depth


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ValueError for what is no such number."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"A temperature of {self.temperature} is none: give 0 (the most probable token) or a number above it.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} would leave no token: give a whole number from 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is no share of probability: give a number above 0 and at most 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"A seed is a whole number from 0, below 2^63, not {self.seed}.")


class Step(NamedTuple):
    """One more token of every row that goes on."""

    rows: list[int]
    """Numbers of the prompts."""
    tokens: list[int]
    iterations: list[int]
    """Evaluations of f (or loops) that the logits of each took; of the first step, that the whole prompt took. Empty where none is."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    depth: Depth = "auto",
    end: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[Step]:
    """At most `count` tokens after each prompt (at least one token, of different lengths), in a batch. A row ends before the token `end`,
    and leaves the batch. depth: as `LanguageModel.extend` takes it. vocabulary: the ids there are; rows of the unembedding from there on
    are padding and never chosen. Raises FloatingPointError where logits are not finite."""
    device = model.unembedding.device
    lengths = [len(prompt) for prompt in prompts]
    cache, rows = Cache(len(prompts), max(lengths) + count), list(range(len(prompts)))
    draws = [torch.Generator(device).manual_seed((sampling.seed + row) % 2**63) for row in rows] if sampling.temperature else []
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    logits, solution = model.extend(torch.tensor(padded, device=device), cache, depth, lengths)
    for made in range(1, count + 1):
        logits = logits[:, :vocabulary]
        tokens = choose(logits, sampling, [draws[row] for row in rows] if draws else [])
        told = [tokens, logits.amax(dim=-1).isfinite()] + ([] if solution is None else [solution.iterations])
        values = torch.cat(told).tolist()  # the one read of the step
        found, finite, iterations = values[: len(rows)], values[len(rows) : 2 * len(rows)], values[2 * len(rows) :]
        if not all(finite):
            raise FloatingPointError("The model's logits are not finite.")
        if end in found:
            kept = [at for at, token in enumerate(found) if token != end]
            if not kept:
                return
            cache.select(kept)
            tokens = tokens[torch.tensor(kept, device=device)]
            rows, found = [rows[at] for at in kept], [found[at] for at in kept]
            iterations = [iterations[at] for at in kept] if iterations else []
        yield Step(rows, found, iterations)
        if made < count:
            logits, solution = model.extend(tokens[:, None], cache, depth)


@torch.inference_mode()
def choose(logits: Tensor, sampling: Sampling, draws: Sequence[torch.Generator] = ()) -> Tensor:
    """A token of each row [b] from its logits [b, v]; draws: a generator for each, where the temperature is not 0."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = probabilities(logits, sampling).cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64, device=logits.device) for draw in draws])
    below = uniform.clamp_max(1 - 2**-52) * cumulative[:, -1:]  # always less than the last, so that its token has a probability
    return torch.searchsorted(cumulative, below, right=True)[:, 0]


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with [b, v], in float64: 0 where a filter leaves a token out. The temperature is above 0."""
    logits = logits.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature  # the largest stays 0, however small the temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        falling, order = logits.sort(dim=-1, descending=True)
        share = falling.softmax(dim=-1)
        out = share.cumsum(dim=-1) - share >= sampling.top_p
        out[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))
    return logits.softmax(dim=-1)
