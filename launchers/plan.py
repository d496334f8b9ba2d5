"""What a recipe costs, before anything starts: parameters, FLOPs, memory and batch arithmetic, in closed form. No torch.

    Plan = parameters by kind
         + FLOPs a token at 0, 1, 2, 4, 8 and the expected solver iterations (model/cost.py says what is counted)
         + bytes on one rank for every ZeRO stage
         + tokens a step, accumulation, steps, FLOPs of the whole run

Sizes that the recipe leaves to the data (vocabulary, sequence length) are read from its manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model.cost import Flops, count_parameters, flops, memory
from pretrain.config import Recipe
from pretrain.errors import Refusal

ITERATIONS = (0, 1, 2, 4, 8)
ZERO_STAGES = (0, 1, 2, 3)


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
    batch: dict[str, int]
    run_flops: float
    zero: int
    memory: dict[str, dict[str, float]]

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


def make_plan(recipe: Recipe, data_ranks: int = 1) -> Plan:
    """The plan of a recipe on `data_ranks` data-parallel ranks. Raises Refusal when the batch does not divide over them."""
    accumulation = recipe.check_world(data_ranks)
    recipe = complete(recipe)
    architecture, length = recipe.architecture, recipe.data.sequence_length
    assert length is not None
    assert recipe.model.vocabulary_size is not None
    solved = recipe.model.kind == "attractor"
    expected = recipe.solver.expected_iterations if solved else None
    tokens_per_step, steps = recipe.train.global_batch * length, recipe.steps(length)
    counts = sorted({*map(float, ITERATIONS), expected}) if expected is not None else [None]
    rows = [_row(recipe, length, count) for count in counts]
    training = next(row.training for row in rows if row.iterations == expected)
    return Plan(
        recipe=recipe.run.name,
        kind=recipe.model.kind,
        sequence_length=length,
        vocabulary_size=recipe.model.vocabulary_size,
        precision=recipe.train.precision,
        parameters=asdict(count_parameters(architecture)),
        flops=rows,
        expected_iterations=expected,
        batch={
            "data_ranks": data_ranks,
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
        memory={str(stage): _memory(recipe, length, stage, data_ranks) for stage in ZERO_STAGES},
    )


def _row(recipe: Recipe, length: int, iterations: float | None) -> FlopsRow:
    count = 0.0 if iterations is None else iterations
    step = flops(recipe.architecture, length, count, recompute=recipe.train.recompute)
    forward = step.head_forward + step.backbone_forward + step.solve + step.application
    inference: Flops = flops(recipe.architecture, length, count, training=False)
    return FlopsRow(iterations, inference.hardware, forward, step.model - forward, step.model, step.hardware, asdict(step))


def _memory(recipe: Recipe, length: int, stage: int, data_ranks: int) -> dict[str, float]:
    bytes_per_value = 2 if recipe.train.precision == "bf16" else 4
    parts = memory(
        recipe.architecture,
        length,
        recipe.train.micro_batch,
        bytes_per_value=bytes_per_value,
        zero=stage,
        data_ranks=data_ranks,
        recompute=recipe.train.recompute,
    )
    return {**asdict(parts), "total": parts.total}
