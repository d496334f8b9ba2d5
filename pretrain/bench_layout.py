"""`attractor bench layout`: a training step by layout, through the real engine, and what the ranks spend on talking.

    step_seconds           median of whole steps, undisturbed
    communication_share    of a second pass: seconds inside collectives over seconds of the step (slowest rank); they include waiting for
                           the others, so an unbalanced pipeline shows here as well
    solve_share            of that pass: seconds of the solve over the step
    solver_share_of_communication    of that pass: seconds inside collectives during the solve over those of the whole step
    sent_bytes             what a rank must send in a step: (n - 1) / n of the whole for a gather or a scatter over n ranks, twice that
                           for an all-reduce (docs/scaling.md predicts it)

Every rank runs `measure`; `python -m pretrain.bench_layout RESULT STEPS RECIPE key=value ...` is one rank. Text and model are those of
`attractor bench step`; the batch is the recipe's train.global_batch in micro-batches of train.micro_batch.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import Batch
from pretrain.agreement import gather, world_size
from pretrain.bench import DEFAULT_LENGTH, DEFAULT_VOCABULARY, Row, text_batches
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.layout import Layout, as_dict, layout_on, refuse_illegal
from pretrain.mesh import Mesh, connect
from pretrain.runtime import process_group

WARM_UP = 4
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "send",
    "recv",
)


@dataclass
class _Meter:
    """Seconds and bytes of one pass on this rank."""

    device: torch.device
    solving: bool = False
    total: float = 0.0
    in_solve: float = 0.0
    solve: float = 0.0
    bytes: float = 0.0
    inside: bool = False

    def timed(self, name: str, work: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.inside:  # one collective may call another
            return work(*arguments, **options)
        self.inside = True
        started = self.now()
        try:
            return work(*arguments, **options)
        finally:
            spent = self.now() - started
            self.inside = False
            self.total += spent
            self.in_solve += spent if self.solving else 0.0
            self.bytes += sent(name, arguments, options)

    def solved(self, work: Any, arguments: tuple[Any, ...]) -> Any:
        started, self.solving = self.now(), True
        try:
            return work(*arguments)
        finally:
            self.solving = False
            self.solve += self.now() - started

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def sent(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    """Bytes a rank must send for one call of a collective of torch.distributed, in a ring or better."""
    values = [*arguments, *options.values()]
    ranks = dist.get_world_size(next((value for value in values if isinstance(value, dist.ProcessGroup)), None))
    held = [value.numel() * value.element_size() for value in values if isinstance(value, Tensor)]
    if name in ("send", "broadcast"):
        return held[0]
    if name == "recv":
        return 0.0
    if name == "all_reduce":
        return 2 * (ranks - 1) / ranks * held[0]
    if name == "all_to_all_single":
        return (ranks - 1) / ranks * held[0]
    return (ranks - 1) * min(held)  # gathers and scatters: the smaller tensor is one rank's part


def complete(recipe: Recipe) -> Recipe:
    """The recipe with sizes for what it leaves to prepared data, of which there is none here."""
    model = replace(recipe.model, vocabulary_size=recipe.model.vocabulary_size or DEFAULT_VOCABULARY)
    data = recipe.data.model_copy(update={"sequence_length": recipe.data.sequence_length or DEFAULT_LENGTH})
    return recipe.model_copy(update={"model": model, "data": data})


def layouts_of(recipe: Recipe, ranks: int) -> list[Layout]:
    """Every layout of `ranks` ranks that this recipe can be cut into, with ZeRO 1; purely data-parallel first."""
    found = []
    for tensor, pipeline in product(range(1, ranks + 1), repeat=2):
        section = recipe.layout.model_copy(update={"tensor": tensor, "pipeline": pipeline, "zero": 1, "sequence_parallel": False})
        if tensor > 1 and recipe.gradient.jacobian_penalty:
            continue
        try:
            layout = layout_on(section, ranks)
            refuse_illegal(section, recipe.architecture, recipe.data.sequence_length)
            recipe.check_world(layout.data)
        except (Refusal, ValueError):
            continue
        found.append(layout)
    return found


def short(layout: Layout) -> str:
    """The axes that have more than one rank, as `data 2, tensor 2`."""
    return ", ".join(f"{axis} {size}" for axis, size in as_dict(layout).items() if size > 1) or "one rank"


def measure(recipe: Recipe, steps: int) -> Row:
    """The row of this process's layout; the same on all ranks."""
    recipe = complete(recipe)
    with process_group(recipe.train) as device:
        from pretrain.engine import build_engine, build_model, language_model

        layout = layout_on(recipe.layout, world_size())
        mesh, accumulation = connect(layout, device), recipe.check_world(layout.data)
        engine = build_engine(recipe, build_model(recipe, device, mesh), accumulation, mesh)
        engine.train()
        step = _stepper(engine, mesh, recipe, accumulation)
        for _ in range(WARM_UP):
            step()
        seconds = []
        meter = _Meter(device)
        for _ in range(steps):
            started = meter.now()
            step()
            seconds.append(meter.now() - started)
        with _metered(meter, language_model(engine).refine):
            started = meter.now()
            evaluations = [step() for _ in range(steps)]
            whole = meter.now() - started
        solvers = meter.in_solve / meter.total if meter.total else 0.0
        shares = gather((meter.total / whole, meter.solve / whole, solvers, meter.bytes / steps))
    communication, solve, in_solve, out = (max(column) for column in zip(*shares, strict=True))
    typical = statistics.median(seconds)
    return {
        "layout": short(layout),
        "ranks": layout.ranks,
        "evaluations": sum(evaluations) / len(evaluations),
        "step_seconds": typical,
        "tokens_per_second": recipe.train.global_batch * (recipe.data.sequence_length or 0) / typical,
        "communication_share": communication,
        "solve_share": solve,
        "solver_share_of_communication": in_solve,
        "sent_bytes": out,
    }


def _stepper(engine: Any, mesh: Mesh, recipe: Recipe, accumulation: int) -> Callable[[], float]:
    from pretrain.step import train_step

    stream = _stream(recipe, mesh)

    def step() -> float:
        result = train_step(engine, stream, accumulation, mesh, mask_documents=False, stop_requested=False)
        return (result.solver or {}).get("solver_evaluations", 0.0)

    return step


def _stream(recipe: Recipe, mesh: Mesh) -> Iterator[Batch]:
    """This rank's micro-batches: every replica takes its rows of the same global batches."""
    batch, micro = recipe.train.global_batch, recipe.train.micro_batch
    share = batch // mesh.layout.data
    rows = text_batches(batch, recipe.data.sequence_length or 0, recipe.model.vocabulary_size or 0, torch.device("cpu"))
    for tokens, targets in rows:
        for first in range(mesh.where.data * share, (mesh.where.data + 1) * share, micro):
            part = slice(first, first + micro)
            yield Batch(tokens[part], targets[part], torch.zeros_like(tokens[part], dtype=torch.int32), torch.arange(micro))


@contextmanager
def _metered(meter: _Meter, refine: Any) -> Iterator[None]:
    """Within it every collective of torch, DeepSpeed and megatron is timed, and so is the solve."""
    from deepspeed import comm as deepspeed_comm

    places: list[tuple[Any, str, str]] = [(module, name, name) for module in (dist, deepspeed_comm) for name in _COLLECTIVES]
    if "megatron.core.tensor_parallel.mappings" in sys.modules:
        mappings = sys.modules["megatron.core.tensor_parallel.mappings"]
        places += [(mappings, "dist_all_gather_func", "all_gather"), (mappings, "dist_reduce_scatter_func", "reduce_scatter_tensor")]
    with ExitStack() as stack:
        for place, attribute, name in places:
            stack.enter_context(patch.object(place, attribute, _timing(meter, name, getattr(place, attribute))))
        if refine is not None and not any(parameter.is_meta for parameter in refine.parameters()):
            solve = refine._solve
            stack.enter_context(patch.object(refine, "_solve", lambda *arguments: meter.solved(solve, arguments)))
        yield


def _timing(meter: _Meter, name: str, work: Any) -> Any:
    return lambda *arguments, **options: meter.timed(name, work, arguments, options)


def main() -> None:
    result, steps, recipe, *overrides = sys.argv[1:]
    row = measure(load_recipe(recipe, overrides), int(steps))
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(row))


if __name__ == "__main__":
    main()
