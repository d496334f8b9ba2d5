"""What a recipe costs, before anything starts: parameters, FLOPs, layout, memory and batch arithmetic, in closed form. No torch.

    Plan = parameters by kind
         + FLOPs a token at 0, 1, 2, 4, 8 and the expected solver iterations (model/cost.py says what is counted)
         + the layout: axes, what is on each pipeline stage, bytes on a rank of it, the bubble
         + bytes on the fullest rank for every ZeRO stage the layout allows
         + tokens a step, accumulation, steps, FLOPs of the whole run
         + an estimate of a step's time (pretrain/scaling.py)

Sizes that the recipe leaves to the data (vocabulary, sequence length) are read from its manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model.cost import Flops, count_parameters, flops, planned, training_flops
from model.memory import Memory, held_parameters
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.gpus import GPUS, Gpu
from pretrain.layout import Layout, as_dict, layout_on
from pretrain.recommend import recommend
from pretrain.scaling import Estimate, efficiency, estimate
from pretrain.shares import shares, stage_memory

ITERATIONS = (0, 1, 2, 4, 8)
LOOPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class FlopsRow:
    """FLOPs a token at one number of solver iterations (None: a model with nothing to solve)."""

    iterations: float | None
    inference: float
    forward: float
    backward: float
    training: float
    hardware: float
    parts: dict[str, float]


@dataclass(frozen=True)
class StageRow:
    """One pipeline stage. Parameters and memory are those of one of its ranks; FLOPs a token, of all its tensor ranks together."""

    stage: int
    ranks: list[int]
    """First and last."""
    blocks: list[int]
    """First block and the one after the last; the same number twice for none."""
    holds: list[str]
    parameters: int
    flops: float
    """Hardware FLOPs of training at the expected iterations."""
    in_flight: int
    """Micro-batches whose activations it keeps."""
    memory: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """Everything `attractor plan` says. FLOPs are a token's unless `run_flops` (the whole run); memory is bytes on one rank."""

    recipe: str
    kind: str
    sequence_length: int
    vocabulary_size: int
    precision: str
    parameters: dict[str, int]
    flops: list[FlopsRow]
    expected_iterations: float | None
    gpus: int
    layout: dict[str, Any]
    stages: list[StageRow]
    bubble: float
    """Share of a step that the average stage waits, by its FLOPs alone."""
    batch: dict[str, int]
    run_flops: float
    zero: int
    memory: dict[str, dict[str, float]]
    """Of the fullest stage, by ZeRO stage."""
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of --json."""
        return asdict(self)


def complete(recipe: Recipe) -> Recipe:
    """The recipe with vocabulary and sequence length stated, from its data where it leaves them open. Raises Refusal where neither says."""
    if recipe.model.vocabulary_size is not None and recipe.data.sequence_length is not None:
        return recipe
    if recipe.data.path is None:
        missing = "model.vocabulary_size" if recipe.model.vocabulary_size is None else "data.sequence_length"
        raise Refusal(
            f"{missing} is left to the prepared data in the recipe {recipe.run.name!r}, but data.path names none: add data.path=DIR, "
            f"or state {missing} itself."
        )
    from data_pipeline import open_manifest

    path = recipe.sources[0][0]
    manifest = open_manifest(path, recipe.data.cache)
    return recipe.completed(manifest.vocabulary_size, manifest.sequence_length, path)


def make_plan(recipe: Recipe, gpus: int | None = None, gpu: Gpu = GPUS["h100"]) -> Plan:
    """The plan of a recipe on `gpus` ranks (None: one replica of the model). Raises Refusal where they do not fit layout or batch."""
    layout = layout_on(recipe.layout, gpus or recipe.layout.tensor * recipe.layout.pipeline)
    accumulation = recipe.check_world(layout.data)
    recipe = complete(recipe)
    architecture, length = recipe.architecture, recipe.data.sequence_length
    assert length is not None
    assert recipe.model.vocabulary_size is not None
    expected = _expected(recipe)
    tokens_per_step, steps = recipe.train.global_batch * length, recipe.steps(length)
    counts = sorted({*map(float, LOOPS if recipe.model.loops else ITERATIONS), expected}) if expected is not None else [None]
    rows = [_row(recipe, length, count) for count in counts]
    training = next(row.training for row in rows if row.iterations == expected)
    stages = _stages(recipe, layout)
    return Plan(
        recipe=recipe.run.name,
        kind=recipe.model.kind,
        sequence_length=length,
        vocabulary_size=recipe.model.vocabulary_size,
        precision=recipe.train.precision,
        parameters=asdict(count_parameters(architecture)),
        flops=rows,
        expected_iterations=expected,
        gpus=layout.ranks,
        layout=as_dict(layout, zero=recipe.layout.zero, sequence_parallel=recipe.layout.sequence_parallel),
        stages=stages,
        bubble=1 - efficiency([stage.flops for stage in stages], accumulation),
        batch={
            "data_ranks": layout.data,
            "micro_batch": recipe.train.micro_batch,
            "accumulation": accumulation,
            "global_batch": recipe.train.global_batch,
            "tokens_per_step": tokens_per_step,
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "budget": recipe.train.tokens,
        },
        run_flops=training * steps * tokens_per_step,
        zero=recipe.layout.zero,
        memory={str(zero): _fullest(recipe, layout, zero) for zero in _zero_stages(layout)},
        estimate=estimate(recipe, layout, gpu),
    )


def make_recommendation(recipe: Recipe, gpus: int, gpu: Gpu) -> list[dict[str, Any]]:
    """Layouts, micro-batch and recomputation to run the recipe with, best first, each as the overrides that choose it and what the
    model of step time says of it. What the recipe itself says of these is not kept. Raises Refusal when nothing fits."""
    recipe = complete(recipe)
    return [
        {
            "overrides": found.overrides(recipe),
            **as_dict(found.layout, **found.section.model_dump(include={"zero", "sequence_parallel"})),
            "micro_batch": found.micro_batch,
            "recompute": found.recompute,
            "memory": found.memory,
            "estimate": asdict(found.estimate),
        }
        for found in recommend(recipe, gpus, gpu)
    ]


def _expected(recipe: Recipe) -> float | None:
    """Iterations of the solver, or of the loop on average, that the plan counts on; None where nothing iterates."""
    if recipe.model.solves:
        return recipe.solver.expected_iterations
    return float(recipe.loop.iterations) if recipe.model.loops else None


def _row(recipe: Recipe, length: int, iterations: float | None) -> FlopsRow:
    count, work = 0.0 if iterations is None else iterations, planned(recipe.architecture, iterations)
    step = training_flops(recipe.architecture, length, work, recompute=recipe.train.recompute)
    forward = step.head_forward + step.backbone_forward + step.solve + step.application
    inference: Flops = flops(recipe.architecture, length, count, training=False)
    return FlopsRow(iterations, inference.hardware, forward, step.model - forward, step.model, step.hardware, asdict(step))


def _stages(recipe: Recipe, layout: Layout) -> list[StageRow]:
    rows = []
    for number, (stage, share) in enumerate(shares(recipe, layout)):
        ends = ["attractor"] * recipe.model.solves + ["loop", "coda"] * recipe.model.loops + ["norm", "head"]
        ranks = [layout.rank(number, 0, 0), layout.rank(number, layout.data - 1, layout.tensor - 1)]
        rows.append(
            StageRow(
                stage=number,
                ranks=ranks,
                blocks=[stage.first, stage.stop],
                holds=["embedding"] * share.start + ends * share.end,
                parameters=held_parameters(recipe.architecture, share).total,
                flops=stage.flops,
                in_flight=share.in_flight,
                memory=_bytes(stage_memory(recipe, layout, share, recipe.layout.zero)),
            )
        )
    return rows


def _zero_stages(layout: Layout) -> tuple[int, ...]:
    """Those that the layout allows (pretrain.layout.refuse_illegal)."""
    if layout.pipeline > 1:
        return (1,)
    return (1, 2, 3) if layout.tensor > 1 else (0, 1, 2, 3)


def _fullest(recipe: Recipe, layout: Layout, zero: int) -> dict[str, float]:
    parts = (stage_memory(recipe, layout, share, zero) for _, share in shares(recipe, layout))
    return _bytes(max(parts, key=lambda part: part.total))


def _bytes(parts: Memory) -> dict[str, float]:
    return {**asdict(parts), "total": parts.total}
