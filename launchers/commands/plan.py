"""`attractor plan`: the costs of a recipe as tables of at most 80 columns, or as JSON. Starts nothing."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from launchers.commands.train import Overrides, Recipe
from launchers.output import console, deliver, si, size
from launchers.plan import Plan, make_plan
from pretrain.config import load_recipe, recipe_names

EPILOG = f"""\
[bold]Recipes[/]

  {", ".join(recipe_names())}

[bold]Examples[/]

  attractor plan attractor-140m

  attractor plan attractor-770m train.micro_batch=4 --gpus 64

  attractor plan demo --json
"""

_KINDS = {
    "total": "all of them",
    "matmul": "in matrix products of blocks: they cost FLOPs",
    "embedding": "token table, tied to the unembedding",
    "value_embedding": "value-embedding tables: looked up, no FLOPs",
    "backbone": "blocks that propose y0",
    "attractor": "blocks of the solved map",
    "head": "an untied unembedding",
}


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", "--procs", min=1, help="Data-parallel ranks to plan for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Say what a recipe costs: parameters, FLOPs, memory, steps. Starts nothing."""
    resolved = load_recipe(recipe, overrides or [])
    if as_json:
        deliver(True, lambda: make_plan(resolved, gpus).as_dict(), lambda _: None)
    else:
        show(make_plan(resolved, gpus))


def show(plan: Plan) -> None:
    """Prints the tables."""
    out = console()
    out.print(
        f"[bold]{plan.recipe}[/]: {plan.kind}, sequence length {plan.sequence_length}, vocabulary {plan.vocabulary_size}, {plan.precision}",
        highlight=False,
    )
    ranks = plan.batch["data_ranks"]
    where = f"On each of {ranks} data ranks" if ranks > 1 else "On one rank"
    for table, note in (
        (_parameters(plan), None),
        (_flops(plan), "Model FLOPs: what the method needs. Hardware adds what backward computes again."),
        (_memory(plan), f"{where}. Activations are an estimate, for one micro-batch; buffers come on top."),
        (_batch(plan), None),
    ):
        out.print()
        out.print(table)
        if note is not None:
            out.print(note, style="dim", highlight=False)


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
    table = _table("Memory a rank", "ZeRO", "weights", "gradients", "optimizer", "activations", "solver", "total")
    for stage, parts in plan.memory.items():
        cells = [size(parts[kind]) for kind in ("weights", "gradients", "optimizer", "activations", "solver", "total")]
        table.add_row(stage, *cells, style="bold" if int(stage) == plan.zero else None)
    return table


def _batch(plan: Plan) -> Table:
    batch = plan.batch
    table = _table("Run", "", "number", "how")
    table.columns[2].justify = "left"
    ranks = f"{batch['data_ranks']} rank{'s' if batch['data_ranks'] > 1 else ''}"
    how = f"{batch['micro_batch']} a micro-batch x {batch['accumulation']} accumulated x {ranks}"
    table.add_row("sequences a step", str(batch["global_batch"]), how)
    table.add_row("tokens a step", f"{batch['tokens_per_step']:,}", f"x {plan.sequence_length} tokens")
    table.add_row("steps", f"{batch['steps']:,}", f"in a budget of {batch['budget']:,} tokens")
    iterations = "" if plan.expected_iterations is None else f" at {plan.expected_iterations:g} iterations"
    table.add_row("training FLOPs", si(plan.run_flops, "FLOP"), f"of {batch['tokens']:,} tokens{iterations}")
    return table
