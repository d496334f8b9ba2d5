"""Which layers sit on which pipeline stage: contiguous runs whose most expensive stage is as cheap as can be. No torch.

    layers    embedding | block 0 ... block n-1 | tail (attractor, or loop and coda; final norm) | head (tied unembedding, loss)

The embedding goes with the first stage, tail and head with the last: neither the attractor nor a loop is ever cut, and the tied table
lives on two stages only. So what is dealt out are the blocks that run once before them. Costs are training FLOPs a token (model.cost),
with the solver's expected iterations in the tail's, which is what makes the last stage shorter than a Transformer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from model.config import ModelConfig
from model.cost import flops, planned, training_flops
from pretrain.layout import most_stages


@dataclass(frozen=True)
class Stage:
    """Blocks first:stop of the backbone (of a loop: of its prelude), and training FLOPs a token with what else the stage holds."""

    first: int
    stop: int
    flops: float


def partition(config: ModelConfig, sequence_length: int, stages: int, *, recompute: bool = False) -> list[Stage]:
    """The stages of a model, in order. With fewer layers than stages, recipes were refused before (pretrain.layout)."""
    block, tail = layer_flops(config, sequence_length, recompute=recompute)
    smallest_last = 0 if most_stages(config) > config.prelude else 1
    counts = balance([round(block)] * config.prelude, round(tail), stages, smallest_last)  # whole: ties stay ties
    bounds = [sum(counts[:stage]) for stage in range(stages + 1)]
    return [
        Stage(first, stop, block * (stop - first) + (tail if stage == stages - 1 else 0.0))
        for stage, (first, stop) in enumerate(pairwise(bounds))
    ]


def layer_flops(config: ModelConfig, sequence_length: int, *, recompute: bool = False) -> tuple[float, float]:
    """(one backbone block, everything after the backbone): hardware FLOPs a token of a training step."""
    whole = training_flops(config, sequence_length, planned(config), recompute=recompute).hardware
    single = replace(config, model=replace(config.model, kind="transformer", backbone_layers=1))
    one = flops(single, sequence_length, 0, recompute=recompute)
    block = one.hardware - one.head_forward - one.head_backward
    return block, whole - block * config.prelude


def balance(costs: Sequence[float], tail: float, stages: int, smallest_last: int) -> list[int]:
    """Numbers of layers a stage, each at least 1 (the last, which also bears `tail`, at least smallest_last), that minimise the
    largest cost of a stage and, among those, the sum of squares."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]] | None:
        """(largest, squares, counts) of the stages from `stage` on, which hold the layers from `start` on."""
        if stage == stages - 1:
            count = len(costs) - start
            cost = total[-1] - total[start] + tail
            return (cost, cost * cost, (count,)) if count >= smallest_last else None
        found = []
        for stop in range(start + 1, len(costs) + 1):
            rest = best(stage + 1, stop)
            if rest is not None:
                cost = total[stop] - total[start]
                found.append((max(cost, rest[0]), cost * cost + rest[1], (stop - start, *rest[2])))
        return min(found) if found else None

    answer = best(0, 0)
    if answer is None:
        raise ValueError(f"{len(costs)} layers do not make {stages} stages of at least one each.")
    return list(answer[2])
