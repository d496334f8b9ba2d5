"""`attractor bench reasoning`: puzzle models side by side at their published shapes, and beside the published TRM code."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, si, size
from pretrain.config import PuzzleRecipe, load_any
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor bench reasoning

  attractor bench reasoning sudoku-trm-7m --against ../TinyRecursiveModels

  attractor bench reasoning sudoku-trm-7m sudoku-attractor-7m train.compile=true --batch 64 --json

  attractor bench reasoning maze-trm-7m model.cells=900 model.vocabulary_size=6 --batch 4
"""
DEFAULT = ("sudoku-trm-7m", "sudoku-attractor-7m", "sudoku-trm-27m", "sudoku-attractor-27m", "sudoku-hrm-27m", "sudoku-transformer-27m")
Row = dict[str, Any]


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE ...] [section.key=value ...]",
            help="Puzzle models to time, and changes to all of them.",
            show_default="those of 7M and 27M parameters on Sudoku",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Puzzles a step.", show_default="train.micro_batch; on a CPU 32 at most"),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Measured steps a model, at least three.")] = 30.0,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR", help="A checkout of the published TRM code, timed in turns with every TRM."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Time training and evaluation steps of puzzle models, beside their matrix products alone and the published TRM code."""
    recipes = chosen(words or [])
    if against is not None and all(recipe.model.kind != "trm" for recipe in recipes):
        raise Refusal("--against times the published TRM code beside TRMs, and none of these recipes is one: add sudoku-trm-7m.")

    def compute() -> list[Row]:
        from pretrain.reasoning.bench import bench_reasoning
        from pretrain.reasoning.bench_published import refuse_no_checkout

        if against is not None:
            refuse_no_checkout(against)
        try:
            return bench_reasoning(recipes, seconds, batch, against)
        except BrokenProcessPool as error:
            raise Refusal(
                "A process that timed a model was ended from outside, most likely because memory ran out: lower --batch."
            ) from error

    deliver(as_json, compute, show)


def chosen(words: list[str]) -> list[PuzzleRecipe]:
    """Recipes and overrides, told apart by the equals sign. Raises Refusal for a recipe of a language model."""
    overrides = [word for word in words if "=" in word]
    recipes = [load_any(name, overrides) for name in [word for word in words if "=" not in word] or DEFAULT]
    for recipe in recipes:
        if not isinstance(recipe, PuzzleRecipe):
            raise Refusal(f"The recipe {recipe.run.name!r} is of a language model, which `attractor bench step` and `bench models` time.")
    return [recipe for recipe in recipes if isinstance(recipe, PuzzleRecipe)]


def show(rows: list[Row]) -> None:
    """Tables of steps, evaluation and, where it ran, the published code."""
    head = rows[0]
    compiled = ", compiled" if head["compiled"] else ""
    title = f"Puzzle models, {head['device']}, {head['precision']}{compiled}, {head['threads']} thread{'s' * (head['threads'] > 1)}"
    table = _table(title, ("recipe", "step", "CPU", "puzzles/s", "FLOP/s", "floor", "solved/s"))
    clock = "cpu_seconds" if head["device"] == "cpu" else "seconds"  # the one that other users of the machine disturb less
    for row in rows:
        table.add_row(
            _name(row),
            _seconds(row["step_seconds"]),
            _seconds(row["step_cpu_seconds"]),
            _rate(row["puzzles_per_second"]),
            si(row["flops_per_second"]),
            f"{100 * row[f'floor_{clock}'] / row[f'step_{clock}']:.0f}%",
            _rate(row["evaluation_puzzles_per_second"]),
        )
    console().print(table)
    console().print("CPU: seconds of all threads. floor: share of the step that its matrix products alone take", style="dim")
    console().print("solved/s: puzzles taken through all supervision steps without gradient", style="dim")
    _show_work(rows)
    _show_published([row for row in rows if "published" in row])


def _show_work(rows: list[Row]) -> None:
    table = _table("What a step does", ("recipe", "batch", "FLOP", "f", "grad.", "solve", "peak", "first"))
    for row in rows:
        table.add_row(
            _name(row),
            str(row["batch"]),
            si(row["flops_per_step"]),
            f"{row['evaluations']:.1f}",
            f"{row['applications']:.0f}",
            f"{row['solver_iterations']:.1f}" if row["solver_iterations"] else "",
            size(row["memory_bytes"]),
            _seconds(row["first_step_seconds"]),
        )
    console().print(table)
    console().print("f, grad.: applications without and with gradients. solve: iterations of one", style="dim")
    console().print("peak: of memory. first: the first step, compilation included", style="dim")


def _show_published(rows: list[Row]) -> None:
    if not rows:
        return
    table = _table("Published TRM code, in turns with ours", ("recipe", "step", "CPU", "solved/s", "step", "CPU", "evaluation"))
    for row in rows:
        found = row["published"]
        table.add_row(
            _name(row),
            _seconds(found["step_seconds"]),
            _seconds(found["step_cpu_seconds"]),
            f"{found['evaluation_puzzles_per_second']:.3g}",
            *(f"{found[name]:.2f}x" for name in ("over_ours", "cpu_over_ours", "evaluation_over_ours")),
        )
    console().print(table)
    console().print("x: seconds of the published code over ours; above 1, ours is faster", style="dim")
    console().print(f"replaced there: {'; '.join(rows[0]['published']['replaced'])}", style="dim")


def _table(title: str, names: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    return table


def _name(row: Row) -> str:
    return str(row["recipe"]).removeprefix("sudoku-")


def _seconds(value: float) -> str:
    """In three digits, whatever the speed of the machine."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
