"""The layouts a recipe should run on, on so many GPUs: every legal one tried against the model of step time. No torch.

Searched: tensor (within a node), pipeline, ZeRO stage, sequence parallelism, micro-batch and recomputation; the rest of the recipe is
kept. A candidate must be legal (pretrain.layout), divide the batch, and leave a fifth of a GPU's memory free on every stage. The
fastest comes first, except that of candidates within RESOLUTION of it the simplest does: the model cannot tell those apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.gpus import Gpu
from pretrain.layout import Layout, layout_on, most_stages, refuse_illegal
from pretrain.scaling import Estimate, estimate
from pretrain.sections import LayoutSection
from pretrain.shares import shares, stage_memory

RESOLUTION = 0.03
"""Differences of step time that are not taken for one."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with what the model says of it."""

    section: LayoutSection
    layout: Layout
    micro_batch: int
    recompute: bool
    memory: float
    """Bytes on a rank of the fullest stage."""
    estimate: Estimate

    def overrides(self, recipe: Recipe) -> list[str]:
        """What turns the recipe into this candidate, as written on the command line."""
        wanted = {f"layout.{key}": value for key, value in self.section.model_dump().items()}
        wanted |= {"train.micro_batch": self.micro_batch, "train.recompute": self.recompute}
        given = recipe.model_dump()
        changed = {key: value for key, value in wanted.items() if given[key.partition(".")[0]][key.partition(".")[2]] != value}
        return [f"{key}={str(value).lower()}" for key, value in changed.items()]

    @property
    def complexity(self) -> tuple[float, ...]:
        """Fewer cuts of the model are simpler, then a lower ZeRO stage, no recomputation, tokens undivided."""
        section = self.section
        return section.tensor * section.pipeline, section.zero, self.recompute, section.sequence_parallel, -self.micro_batch


def recommend(recipe: Recipe, gpus: int, gpu: Gpu, count: int = 5) -> list[Candidate]:
    """The best layouts of a complete recipe on `gpus` GPUs, best first. Raises Refusal when none is legal, or none fits."""
    fitting = []
    legal = False
    for section, layout in _layouts(recipe, gpus, gpu):
        for variant in _variants(recipe, section, layout):
            legal = True
            held = max(stage_memory(variant, layout, share, section.zero).total for _, share in shares(variant, layout))
            if held <= gpu.usable * gpu.memory:
                said = estimate(variant, layout, gpu)
                fitting.append(Candidate(section, layout, variant.train.micro_batch, variant.train.recompute, held, said))
    if not legal:
        raise Refusal(
            f"No layout of {recipe.run.name!r} on {gpus} GPUs divides its batch: train.global_batch={recipe.train.global_batch} sequences "
            f"over tensor ranks that divide the model. Try {_nearest(recipe, gpus)} GPUs, or another train.global_batch."
        )
    if not fitting:
        raise Refusal(
            f"No layout of {recipe.run.name!r} on {gpus} GPUs fits {gpu.usable * gpu.memory / 1e9:.0f} GB of {gpu.name}, even with "
            f"train.micro_batch=1 and recomputation. Take more GPUs."
        )
    fastest = min(candidate.estimate.step for candidate in fitting)
    near = [candidate for candidate in fitting if candidate.estimate.step <= fastest * (1 + RESOLUTION)]
    first = min(near, key=lambda candidate: candidate.complexity)
    others = sorted((c for c in fitting if c is not first), key=lambda c: (c.estimate.step, c.complexity))
    return [first, *_distinct(others, first, count - 1)]


def _distinct(ordered: list[Candidate], first: Candidate, count: int) -> list[Candidate]:
    """The first of each other way to cut the model, so that the alternatives say something."""
    seen, chosen = {first.layout}, []
    for candidate in ordered:
        if candidate.layout not in seen:
            seen.add(candidate.layout)
            chosen.append(candidate)
    return chosen[:count]


def _layouts(recipe: Recipe, gpus: int, gpu: Gpu) -> Iterator[tuple[LayoutSection, Layout]]:
    """Legal layouts of the model on that many GPUs, tensor ranks inside a node."""
    for tensor in range(1, min(gpu.node, gpus) + 1):
        for pipeline in range(1, most_stages(recipe.architecture) + 1):
            if gpus % (tensor * pipeline):
                continue
            for zero in (1,) if pipeline > 1 or gpus == tensor else (1, 2, 3):
                for divided in (False, True) if tensor > 1 else (False,):
                    section = LayoutSection(tensor=tensor, pipeline=pipeline, zero=zero, sequence_parallel=divided)
                    if _legal(section, recipe):
                        yield section, layout_on(section, gpus)


def _legal(section: LayoutSection, recipe: Recipe) -> bool:
    try:
        refuse_illegal(section, recipe.architecture, recipe.data.sequence_length)
    except ValueError:
        return False
    if section.zero == 3 and recipe.train.compile and recipe.model.loops:  # see Recipe
        return False
    return section.tensor == 1 or not recipe.gradient.jacobian_penalty


def _variants(recipe: Recipe, section: LayoutSection, layout: Layout) -> Iterator[Recipe]:
    """The recipe on that layout with every micro-batch its batch allows, with recomputation and without."""
    share, rest = divmod(recipe.train.global_batch, layout.data)
    if rest:
        return
    for micro_batch in (size for size in range(1, share + 1) if share % size == 0):
        for recompute in (False, True):
            train = recipe.train.model_copy(update={"micro_batch": micro_batch, "recompute": recompute})
            yield recipe.model_copy(update={"layout": section, "train": train})


def _nearest(recipe: Recipe, gpus: int) -> str:
    """GPU counts near `gpus` on which data parallelism alone divides the batch."""
    counts = [n for n in range(1, recipe.train.global_batch + 1) if recipe.train.global_batch % n == 0]
    return " or ".join(str(n) for n in [n for n in counts if n < gpus][-1:] + [n for n in counts if n > gpus][:1])
