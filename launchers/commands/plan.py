"""`attractor plan`: the costs of a recipe as tables of at most 80 columns, or as JSON. Starts nothing."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.commands.match import Iterations, MeasuredRuns, Quantity, match, split_words
from launchers.commands.puzzle_plan import plan_puzzles, refuse_puzzles
from launchers.match import QUANTITIES
from launchers.output import console, deliver, si, size
from launchers.plan import Plan, make_plan, make_recommendation
from pretrain.config import PuzzleRecipe, load_any, recipe_names
from pretrain.errors import Refusal
from pretrain.gpus import GPUS, Gpu
from pretrain.ledger import peak_flops
from pretrain.recipe_files import LANGUAGE_REGIME, REASONING_REGIME

EPILOG = f"""\
[bold]Recipes[/]

  {", ".join(recipe_names(LANGUAGE_REGIME))}

[bold]Recipes of puzzles[/]

  {", ".join(recipe_names(REASONING_REGIME))}

[bold]Examples[/]

  attractor plan attractor-140m

  attractor plan attractor-770m train.micro_batch=4 --gpus 64

  attractor plan attractor-770m layout.tensor=2 layout.pipeline=2 --gpus 64

  attractor plan attractor-770m --gpus 64 --recommend

  attractor plan demo --json

  attractor plan sudoku-attractor-27m data.path=data/sudoku train.micro_batch=48 --gpus 8

[bold]Matched comparisons[/] (docs/matching.md)

  attractor plan --match flops attractor-770m transformer-1.3b

  attractor plan --match matmul attractor-140m transformer-140m train.tokens=2e9

  attractor plan --match flops attractor-140m transformer-140m --iterations attractor=4.6
"""

_KINDS = {
    "total": "all of them",
    "matmul": "in matrix products of blocks: they cost FLOPs",
    "embedding": "token table, tied to the unembedding",
    "value_embedding": "value-embedding tables: looked up, no FLOPs",
    "backbone": "blocks that propose y0; of a loop, all",
    "attractor": "blocks of the solved map",
    "head": "an untied unembedding",
}
_BYTES = ("weights", "gradients", "optimizer", "activations", "solver", "total")
_PARTS = {
    "compute": "compute",
    "backbone": "tensor ranks: blocks and head",
    "solve": "tensor ranks: the solve",
    "stages": "between stages",
    "bubble": "pipeline bubble",
    "gradients": "gradients and weights",
    "optimizer": "optimizer",
}


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|section.key=value",
            help="A recipe (with --match several): a name below, or a YAML file. Then changes to all of them, such as train.tokens=2e9.",
            show_default=False,
        ),
    ],
    gpus: Annotated[
        int | None, typer.Option("--gpus", "--procs", min=1, help="Ranks to plan for. Default: one replica of the model.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help=f"GPUs to estimate times for: {' or '.join(GPUS)}. Default: h100.")
    ] = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Choose layout, micro-batch and recomputation in place of the recipe's own.")
    ] = False,
    by: Quantity = None,
    iterations: Iterations = None,
    measured: MeasuredRuns = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Say what a recipe costs: parameters, FLOPs, layout, memory, steps; or match several. Starts nothing."""
    recipes, overrides = split_words(words)
    refuse_puzzles(recipes, by, recommend, hardware)
    if by is not None:
        if recommend or gpus is not None or hardware is not None:
            raise Refusal("--gpus, --hardware and --recommend plan one recipe: leave them out beside --match.")
        match(by, recipes, overrides, iterations or [], measured or [], as_json)
        return
    if iterations or measured:
        raise Refusal("--iterations and --measured belong to --match: add it, or set solver.expected_iterations or loop.iterations.")
    if len(recipes) != 1:
        given = f"not {len(recipes)} ({', '.join(recipes)})" if recipes else "and none was named"
        raise Refusal(f"A plan is of one recipe, {given}. Name one; to compare several add --match {'|'.join(QUANTITIES)}.")
    plan_one(recipes[0], overrides, gpus, hardware or "h100", recommend, as_json)


def plan_one(recipe: str, overrides: list[str], gpus: int | None, hardware: str, recommend: bool, as_json: bool) -> None:
    """The plan of one recipe, or its recommended layouts."""
    resolved = load_any(recipe, overrides)
    if isinstance(resolved, PuzzleRecipe):
        plan_puzzles(resolved, gpus, as_json)
        return
    if hardware not in GPUS:
        raise Refusal(f"--hardware {hardware} is not known: choose {' or '.join(GPUS)}.")
    gpu = GPUS[hardware]
    if recommend:
        ranks = gpus or 1
        words = ["attractor", "plan", recipe, *overrides, "--gpus", str(ranks), "--hardware", hardware]
        deliver(as_json, lambda: make_recommendation(resolved, ranks, gpu), lambda found: show_recommendation(found, words, ranks, gpu))
    elif as_json:
        deliver(True, lambda: make_plan(resolved, gpus, gpu).as_dict(), lambda _: None)
    else:
        show(make_plan(resolved, gpus, gpu), gpu)


def show(plan: Plan, gpu: Gpu) -> None:
    """Prints the tables. Those of layout and time are left out for one rank, which has neither."""
    out = console()
    out.print(
        f"[bold]{plan.recipe}[/]: {plan.kind}, sequence length {plan.sequence_length}, vocabulary {plan.vocabulary_size}, {plan.precision}",
        highlight=False,
    )
    where = f"On each of {plan.gpus} {'data ' * (plan.gpus == plan.batch['data_ranks'])}ranks" if plan.gpus > 1 else "On one rank"
    tables: list[tuple[Table, str | None]] = [
        (_parameters(plan), None),
        (_flops(plan), "Model FLOPs: what the method needs. Hardware adds what backward computes again."),
        (_memory(plan), f"{where}. Activations are an estimate, for one micro-batch; buffers come on top."),
        (_batch(plan), None),
    ]
    if len(plan.stages) > 1:
        flight = [stage.in_flight for stage in plan.stages]
        tables[2] = (
            _stage_memory(plan),
            f"On a rank of each stage. Activations are an estimate, of the micro-batches in flight: {flight[0]} on stage 0, "
            f"{flight[-1]} on the last. Buffers come on top.",
        )
    if plan.gpus > plan.batch["data_ranks"]:
        what = "Parameters on a rank. FLOPs a token of training, with what backward computes again, of a stage's tensor ranks together."
        tables.insert(2, (_stages(plan), what))
    if plan.gpus > 1:
        tables.insert(2, (_layout(plan), None))
        tables.append((_estimate(plan), _said(plan, gpu)))
    for table, note in tables:
        out.print()
        out.print(table)
        if note is not None:
            out.print(note, style="dim", highlight=False)


def show_recommendation(found: list[dict[str, Any]], words: list[str], ranks: int, gpu: Gpu) -> None:
    """Prints the layouts, best first, and the command that plans the best: `words` and its overrides."""
    out = console()
    names = ("tensor", "stages", "data", "ZeRO", "micro", "memory", "tokens/s", "MFU", "also")
    table = _table(f"Layouts for {ranks} x {gpu.name}, by a model of step time", *names)
    table.columns[-1].justify = "left"
    for row in found:
        said, also = row["estimate"], ["divided"] * row["sequence_parallel"] + ["recompute"] * row["recompute"]
        cells = [*(str(row[key]) for key in ("tensor", "pipeline", "data", "zero", "micro_batch")), _gigabytes(row["memory"])]
        cells += [f"{said['tokens_per_second']:,.0f}", f"{said['mfu']:.0%}", ", ".join(also)]
        table.add_row(*cells, style="bold" if row is found[0] else None)
    out.print(table)
    out.print(
        f"One row for each way to cut the model. micro: train.micro_batch; divided: layout.sequence_parallel. Memory is the fullest "
        f"rank's, at most {gpu.usable:.0%} of {_gigabytes(gpu.memory)}; tokens/s a GPU. Nothing here was measured: docs/scaling.md.",
        style="dim",
        highlight=False,
    )
    out.print("\nIn full:", highlight=False)
    out.print("  " + shlex.join([*words, *found[0]["overrides"]]), soft_wrap=True, highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("Parameters", "kind", "number", "what")
    table.columns[2].justify = "left"
    for kind, number in plan.parameters.items():
        if number or kind == "total":
            table.add_row(kind.replace("_", " "), si(number), _KINDS[kind])
    return table


def _flops(plan: Plan) -> Table:
    table = _table("FLOPs a token", "iterations", "inference", "forward", "backward", "training", "hardware")
    for row in plan.flops:
        name = "none solved" if row.iterations is None else f"{row.iterations:g}"
        expected = row.iterations is not None and row.iterations == plan.expected_iterations
        numbers = [si(value) for value in (row.inference, row.forward, row.backward, row.training, row.hardware)]
        table.add_row(f"{name} (expected)" if expected else name, *numbers, style="bold" if expected else None)
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory a rank", "ZeRO", *_BYTES)
    for stage, parts in plan.memory.items():
        cells = [size(parts[kind]) for kind in _BYTES]
        table.add_row(stage, *cells, style="bold" if int(stage) == plan.zero else None)
    return table


def _layout(plan: Plan) -> Table:
    axes = plan.layout
    table = _table(f"Layout of {plan.gpus} ranks", "axis", "ranks", "what they share")
    table.columns[2].justify = "left"
    count = plan.batch["accumulation"]
    stages = f"the blocks; 1F1B with {count} micro-batches waits {plan.bubble:.0%} of a step" if axes["pipeline"] > 1 else ""
    table.add_row("pipeline", str(axes["pipeline"]), stages)
    states = ("nothing but the batch", "optimizer state (ZeRO 1)", "optimizer state and gradients (ZeRO 2)", "all that is stored (ZeRO 3)")
    table.add_row("data", str(axes["data"]), states[plan.zero] if axes["data"] > 1 else "")
    tokens = "all tokens between them" if axes["sequence_parallel"] else "the solver's tokens" if plan.kind in ("attractor", "deq") else ""
    table.add_row("tensor", str(axes["tensor"]), f"the matrices{', ' * bool(tokens)}{tokens}" if axes["tensor"] > 1 else "")
    return table


def _stages(plan: Plan) -> Table:
    table = _table("Stages", "stage", "ranks", "blocks", "also holds", "parameters", "FLOPs", "share")
    table.columns[3].justify = "left"
    whole = sum(stage.flops for stage in plan.stages)
    for stage in plan.stages:
        first, stop = stage.blocks
        blocks = "none" if first == stop else f"{first}" if stop == first + 1 else f"{first}-{stop - 1}"
        numbers = [si(stage.parameters), si(stage.flops), f"{stage.flops / whole:.0%}"]
        table.add_row(str(stage.stage), f"{stage.ranks[0]}-{stage.ranks[1]}", blocks, ", ".join(stage.holds), *numbers)
    return table


def _stage_memory(plan: Plan) -> Table:
    table = _table(f"Memory a rank, ZeRO {plan.zero}", "stage", *_BYTES)
    for stage in plan.stages:
        table.add_row(str(stage.stage), *(size(stage.memory[kind]) for kind in _BYTES))
    return table


def _estimate(plan: Plan) -> Table:
    said = plan.estimate
    table = _table(f"Estimated step on {said.gpu} (a model)", "part", "time", "share", "a rank sends")
    for part, name in _PARTS.items():
        seconds, sent = said.seconds[part], said.sent.get(part, 0.0)
        if seconds:
            table.add_row(name, _duration(seconds), f"{seconds / said.step:.0%}", size(sent) if sent else "")
    table.add_row("step", _duration(said.step), "", "", style="bold")
    return table


def _said(plan: Plan, gpu: Gpu) -> str:
    said, peak = plan.estimate, peak_flops(gpu.name, plan.precision) or 0.0
    hidden = f" ({_duration(said.step_overlapped)} a step if backward hid all reduction)" if said.step_overlapped < said.step else ""
    return (
        f"{said.tokens_per_second:,.0f} tokens/s a GPU, {said.mfu:.0%} MFU{hidden}. A model, not a measurement: it assumes "
        f"{gpu.matrix_share:.0%} of {si(peak, 'FLOP/s')} in matrix products, {gpu.link_share:.0%} of {_gigabytes(gpu.nvlink)}/s NVLink and "
        f"of {_gigabytes(gpu.network)}/s a GPU between nodes of {gpu.node}, and more: docs/scaling.md."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.0f} GB"


def _batch(plan: Plan) -> Table:
    batch = plan.batch
    table = _table("Run", "", "number", "how")
    table.columns[2].justify = "left"
    kind = "replica" if plan.gpus > batch["data_ranks"] else "rank"
    ranks = f"{batch['data_ranks']} {kind}{'s' if batch['data_ranks'] > 1 else ''}"
    how = f"{batch['micro_batch']} a micro-batch x {batch['accumulation']} accumulated x {ranks}"
    table.add_row("sequences a step", str(batch["global_batch"]), how)
    table.add_row("tokens a step", f"{batch['tokens_per_step']:,}", f"x {plan.sequence_length} tokens")
    table.add_row("steps", f"{batch['steps']:,}", f"in a budget of {batch['budget']:,} tokens")
    iterations = "" if plan.expected_iterations is None else f" at {plan.expected_iterations:g} iterations"
    table.add_row("training FLOPs", si(plan.run_flops, "FLOP"), f"of {batch['tokens']:,} tokens{iterations}")
    return table
