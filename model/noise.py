"""What a model draws at random, as a function of the tokens alone: start states, and Poisson loop counts.

    seed_i = hash(tokens of sequence i);   noise_i ~ N(0, std^2) from a generator seeded so;   count_i = F^-1(u_i), u_i from that seed

Without gradients, in evaluation, every sequence is given the same noise: then an output depends on no later token.

Nothing of it is state: a run that resumes, a rank that shares its sequences with others (tensor or pipeline) and any split of a batch over
ranks and micro-batches draw the same, without a generator to save or to agree on. A sequence that is met again is given the same draw;
pretraining meets few again. Noise differs between kinds of device, as torch's generators do. It is drawn in blocks of positions, so a
position's does not depend on how many there are: a sequence that grows in generation keeps what it had.

The seeds are read by the host: one synchronisation a call, in training.
Shapes: tokens [b, s]; noise [b, s, w].
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from model.attention import Context

_BLOCK = 256  # positions drawn at a time
_MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)  # odd constants of splitmix64, made positive int64


def seeds_of(tokens: Tensor) -> list[int]:
    """Those of the sequences while gradients are on; else the same for all."""
    return sequence_seeds(tokens) if torch.is_grad_enabled() else [0] * len(tokens)


def sequence_seeds(tokens: Tensor) -> list[int]:
    """A number of 32 bits for each sequence; any change of a token or of an order changes it."""
    a, b, c = _MULTIPLIERS
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = (tokens.long() + 1) * a + position * b  # int64 wraps around
    mixed = (mixed ^ (mixed >> 29)) * c
    mixed = mixed ^ (mixed >> 32)
    return [(total ^ (total >> 32)) & 0xFFFFFFFF for total in mixed.sum(dim=1).tolist()]


def normal(seeds: list[int], length: int, width: int, std: float, like: Tensor) -> Tensor:
    """Noise [b, s, w] on the device and in the precision of `like`."""
    drawn = sorted(set(seeds))
    blocks = torch.empty((len(drawn), -(-length // _BLOCK), _BLOCK, width), device=like.device, dtype=like.dtype)
    for row, seed in zip(blocks, drawn, strict=True):
        generator = torch.Generator(like.device).manual_seed(seed)
        for block in row:
            block.normal_(0.0, std, generator=generator)
    noise = blocks.flatten(1, 2)[:, :length]
    if len(drawn) == 1:
        return noise.expand(len(seeds), -1, -1)
    return noise[torch.tensor([drawn.index(seed) for seed in seeds], device=like.device)]


def first_noise(context: Context, seeds: list[int], width: int, std: float, like: Tensor) -> Tensor:
    """Noise [b, s, w] of the context's tokens; of a sequence that grows in a cache, at the positions of the new ones."""
    cache = context.cache
    if cache is None:
        return normal(seeds, context.tokens.shape[1], width, std, like)
    return cache.at_positions("noise", lambda: normal(seeds[:1], cache.capacity, width, std, like)[0]).expand_as(like)


def poisson_counts(seeds: list[int], mean: float) -> list[int]:
    """max(1, n) with n ~ Poisson(mean), one a seed: the smallest n whose distribution function passes a uniform number."""
    return [max(1, _quantile(random.Random(seed).random(), mean)) for seed in seeds]


def _quantile(uniform: float, mean: float) -> int:
    count, mass = 0, math.exp(-mean)
    total = mass
    while total < uniform and mass > 0:
        count += 1
        mass *= mean / count
        total += mass
    return count
