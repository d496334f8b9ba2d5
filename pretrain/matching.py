"""Matched budgets and shapes: the tokens at which two runs cost the same FLOPs, the shape at which two models are of one size. No torch.

    FLOPs of a run = tokens * model FLOPs a token (model/cost.py) at given iterations

so a budget follows in closed form, up to whole optimizer steps. A run is matched by *model* FLOPs, what the method requires:
evaluations of f and loops are part of that, recomputation in backward is not, since train.recompute is a choice of the
implementation that a faster one would make otherwise. Tables show hardware FLOPs beside them.

A shape is solved for over width (heads of the recipe's own size), blocks and, where these are too coarse, the MLP's width. Of
those within TOLERANCE of the target the one is taken whose proportions differ least from the recipe's:

    distance = |log a / a0| + |log m / m0| + |log c / c0|    a: width / blocks, m: MLP width / width, c: core / blocks (parcae, looped)

Refused: a budget below half a step, a target that no legal shape meets (the nearest is named).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from model.config import LoopConfig
from model.cost import Flops, Work, count_parameters, planned, training_flops
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.layout import refuse_illegal

TOLERANCE = 0.01
"""Relative difference of parameters that counts as matched."""

_MLP_STEPS = (64, 8)
"""An MLP's width is a multiple of the first of these that is fine enough: matrix units take multiples of 8, tiles are of 64."""
_MLP_STRETCH = 2.0
"""Most that it is stretched or shrunk by."""


def token_flops(recipe: Recipe, iterations: float | Work | None = None) -> Flops:
    """FLOPs a token of training, by part; `.model` is what is matched, `.hardware` adds recomputation.

    iterations: None, what the recipe plans with; a number, evaluations of f (attractor, deq) or mean loops (parcae, looped) a
    sequence, with the gradient's work planned for it; a Work, all three counts as measured. The recipe must state vocabulary and
    sequence length (launchers.plan.complete).
    """
    return training_flops(recipe.architecture, _length(recipe), work_of(recipe, iterations), recompute=recipe.train.recompute)


def work_of(recipe: Recipe, iterations: float | Work | None) -> Work:
    """Evaluations, applications and products a sequence: as given, or planned."""
    return iterations if isinstance(iterations, Work) else planned(recipe.architecture, iterations)


def run_flops(recipe: Recipe, tokens: float, iterations: float | Work | None = None) -> float:
    """Model FLOPs of training on so many tokens. Iterations as in `token_flops`."""
    return tokens * token_flops(recipe, iterations).model


def tokens_for_flops(recipe: Recipe, flops: float, iterations: float | Work | None = None) -> int:
    """The token budget, in whole steps of the recipe, whose model FLOPs come nearest to `flops`.

    It is at most half a step away: a relative error of 1 / (2 n) for a budget of n steps, so below 0.1 % from 500 steps. Raises
    Refusal where half a step is already too much.
    """
    return nearest_budget(recipe, flops / token_flops(recipe, iterations).model)


def nearest_budget(recipe: Recipe, tokens: float) -> int:
    """Tokens of the whole number of steps nearest to `tokens`. Raises Refusal where that is none."""
    step = recipe.train.global_batch * _length(recipe)
    steps = round(tokens / step)
    if steps < 1:
        raise Refusal(
            f"The matched budget of {recipe.run.name!r} would be {tokens:,.0f} tokens, less than half a step of "
            f"train.global_batch={recipe.train.global_batch} sequences ({step:,} tokens). Nearest is one step, train.tokens={step}: raise "
            f"the first recipe's train.tokens, or lower train.global_batch."
        )
    return steps * step


@dataclass(frozen=True)
class Shape:
    """A recipe brought to a number of parameters."""

    recipe: Recipe
    overrides: list[str]
    """What turns the recipe it was made from into it; empty where that was near enough."""
    count: int
    """Parameters of the kind asked for."""
    error: float
    """|count / target - 1|."""
    distance: float
    """From the recipe's own proportions."""


def match_shape(recipe: Recipe, quantity: str, target: int) -> Shape:
    """The shape with `target` parameters of that kind ("total" or "matmul"), within TOLERANCE, and nearest to the recipe's proportions.

    attractor.layers, the size of a head and everything that is no shape stay. Raises Refusal, naming the nearest, where none is so near.
    """
    shapes = list(_shapes(recipe, quantity, target))
    near = [shape for shape in shapes if shape.error <= TOLERANCE]
    if near:
        return min(near, key=lambda shape: (shape.distance, shape.error))
    nearest = min(shapes, key=lambda shape: shape.error, default=None)
    said = "" if nearest is None else f" Nearest is {' '.join(nearest.overrides) or 'the recipe as it is'}, with {nearest.count:,}."
    raise Refusal(
        f"No shape of {recipe.run.name!r} with heads of {recipe.model.head_dim} channels has {target:,} {quantity} parameters to "
        f"{TOLERANCE:.0%}.{said} Choose another model.heads (the size of a head is kept), vocabulary or layout, or another first recipe."
    )


def _shapes(recipe: Recipe, quantity: str, target: int) -> Iterator[Shape]:
    """Of every width the depths next to the target, where legal: with the recipe's own MLP or the one that meets the target best."""
    tried = False
    for heads in itertools.count(1):
        width = heads * recipe.model.head_dim
        if recipe.model.value_embeddings and width < recipe.model.value_gate_channels:
            continue
        if heads * recipe.model.key_value_heads % recipe.model.heads:
            continue  # as many query heads a key head as the recipe has
        least = _reshaped(recipe, heads, _least_blocks(recipe))
        if _count(_with_mlp(least, math.ceil(_own_mlp(recipe, width) / _MLP_STRETCH)), quantity) > (1 + TOLERANCE) * target and tried:
            return
        tried = True
        for blocks in _depths(recipe, heads, quantity, target):
            for candidate in _mlps(_reshaped(recipe, heads, blocks), quantity, target):
                if _legal(candidate):
                    yield _shape(recipe, candidate, quantity, target)


def _shape(recipe: Recipe, candidate: Recipe, quantity: str, target: int) -> Shape:
    count = _count(candidate, quantity)
    pairs = zip(_proportions(candidate), _proportions(recipe), strict=True)
    distance = sum(abs(math.log(now / own)) for now, own in pairs)
    return Shape(candidate, _overrides(recipe, candidate), count, abs(count / target - 1), distance)


def _proportions(recipe: Recipe) -> list[float]:
    """Width over stored blocks, MLP width over width and, where blocks are looped, those over all."""
    m = recipe.model
    blocks = m.backbone_layers + (recipe.attractor.layers if m.solves else 0)
    return [m.width / blocks, m.hidden / m.width, *([recipe.loop.core / m.backbone_layers] if m.loops else [])]


def _depths(recipe: Recipe, heads: int, quantity: str, target: int) -> Iterator[int]:
    """Blocks at which the count passes the target, and two on either side: value embeddings come with every other block."""
    if recipe.model.backbone_layers == 0:  # a deq that solves for everything stays one
        yield 0
        return
    least = low = _least_blocks(recipe)
    high = low + 1
    while _count(_reshaped(recipe, heads, high), quantity) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(_reshaped(recipe, heads, middle), quantity) < target else (low, middle)
    yield from range(max(least, low - 1), high + 2)


def _mlps(recipe: Recipe, quantity: str, target: int) -> Iterator[Recipe]:
    """The recipe as it is and, where that is not near enough, with the MLP whose width meets the target best."""
    yield recipe
    count, own = _count(recipe, quantity), recipe.model.hidden
    if abs(count / target - 1) <= TOLERANCE:
        return
    slope = _count(_with_mlp(recipe, own + 1), quantity) - count  # parameters are linear in it
    for step in _MLP_STEPS:
        least, most = math.ceil(own / _MLP_STRETCH / step), math.floor(own * _MLP_STRETCH / step)
        wanted = round((own + (target - count) / slope) / step)
        stretched = _with_mlp(recipe, step * max(1, least, min(most, wanted)))
        yield stretched
        if abs(_count(stretched, quantity) / target - 1) <= TOLERANCE:
            return


def _reshaped(recipe: Recipe, heads: int, blocks: int) -> Recipe:
    """The recipe with so many heads of its own size and so many blocks; MLP, key heads and looped parts in their proportion."""
    m = recipe.model
    width = heads * m.head_dim
    model = replace(
        m,
        width=width,
        heads=heads,
        kv_heads=None if m.kv_heads is None else m.kv_heads * heads // m.heads,
        backbone_layers=blocks,
        mlp_width=None if m.mlp_width is None else _own_mlp(recipe, width),
    )
    return recipe.model_copy(update={"model": model, "loop": _parts(recipe, blocks) if m.loops else recipe.loop})


def _own_mlp(recipe: Recipe, width: int) -> int:
    """The MLP's width in the recipe's own proportion, a multiple of 8 unless it is the recipe's own."""
    exact = recipe.model.hidden * width / recipe.model.width
    return round(exact) if exact == recipe.model.hidden else max(8, 8 * round(exact / 8))


def _with_mlp(recipe: Recipe, width: int) -> Recipe:
    return recipe.model_copy(update={"model": replace(recipe.model, mlp_width=width)})


def _least_blocks(recipe: Recipe) -> int:
    """Blocks without which the model would be another: one of each looped part it has, one of a backbone (a deq may have none)."""
    if recipe.model.loops:
        return sum(part > 0 for part in (recipe.architecture.prelude, recipe.loop.coda, recipe.loop.core))
    return min(1, recipe.model.backbone_layers)


def _parts(recipe: Recipe, blocks: int) -> LoopConfig:
    """So many blocks in the recipe's proportion: one for each part it has, then one by one to the part that lacks most of its share."""
    own = (recipe.architecture.prelude, recipe.loop.coda, recipe.loop.core)  # of equals the core comes last: it costs a block an iteration
    parts = [min(1, part) for part in own]
    while sum(parts) < blocks:
        lacks = [blocks * share - part * sum(own) for share, part in zip(own, parts, strict=True)]
        parts[lacks.index(max(lacks))] += 1
    return replace(recipe.loop, coda=parts[1], core=parts[2])


def _count(recipe: Recipe, quantity: str) -> int:
    return asdict(count_parameters(recipe.architecture))[quantity]


def _legal(recipe: Recipe) -> bool:
    """Whether the recipe's own layout cuts the shape."""
    try:
        refuse_illegal(recipe.layout, recipe.architecture, recipe.data.sequence_length)
    except ValueError:
        return False
    return True


def _overrides(recipe: Recipe, candidate: Recipe) -> list[str]:
    """What turns one into the other, as written on the command line."""
    keys = ("model.width", "model.heads", "model.kv_heads", "model.backbone_layers", "loop.core", "loop.coda", "model.mlp_width")
    changed = []
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(candidate, section), name)
        if value != getattr(getattr(recipe, section), name):
            changed.append(f"{key}={value}")
    return changed


def _length(recipe: Recipe) -> int:
    if recipe.data.sequence_length is None:
        raise ValueError("data.sequence_length must be set to count FLOPs.")
    return recipe.data.sequence_length
