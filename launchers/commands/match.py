"""`attractor plan --match`: the tables of recipes matched by one quantity, of at most 80 columns, or JSON. Starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from launchers.match import QUANTITIES, Match, Said, make_match
from launchers.output import console, deliver, si
from pretrain.measured import measured

_PANEL = "Several recipes, matched to the first"
Quantity = Annotated[
    str | None,
    typer.Option("--match", metavar="QUANTITY", help=f"What they shall have in common: {', '.join(QUANTITIES)}.", rich_help_panel=_PANEL),
]
Iterations = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER", help="Iterations a sequence of a recipe, or of all of a kind (attractor=4.6).", rich_help_panel=_PANEL
    ),
]
MeasuredRuns = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN", help="A finished run, whose mean iterations recipes of its kind take.", rich_help_panel=_PANEL),
]

_SIZES = {
    "total": "total parameters",
    "matmul": "matmul parameters",
    "tokens": "tokens",
    "flops": "FLOPs of the run",
}


def match(
    quantity: str, recipes: Sequence[str], overrides: Sequence[str], iterations: Sequence[str], runs: Sequence[Path], as_json: bool
) -> None:
    """Solves and prints. Raises Refusal where that cannot be."""

    def solve() -> Match:
        return make_match(quantity, recipes, overrides, Said(iterations, [measured(run) for run in runs]))

    if as_json:
        deliver(True, lambda: solve().as_dict(), lambda _: None)
    else:
        show(solve())


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(recipes, overrides): an override has an equals sign."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def show(found: Match) -> None:
    """Prints the tables, what is matched and what is not, and the words that train each recipe so."""
    out = console()
    out.print(
        f"Matched by [bold]{QUANTITIES[found.quantity]}[/] to [bold]{found.rows[0].recipe}[/]; sequence length "
        f"{found.sequence_length}, vocabulary {found.vocabulary_size}",
        highlight=False,
    )
    notes = (
        "x: over the first recipe's, here and below.",
        _work(found),
        "Of training, as the method needs; hardware adds what backward repeats.",
    )
    for table, note in zip((_parameters(found), _budget(found), _flops(found)), notes, strict=True):
        out.print()
        out.print(table)
        if note:
            out.print(note, style="dim", highlight=False)
    out.print()
    for line in _said(found):
        out.print(line, highlight=False)
    out.print("\nRecipes and what to add to them:", highlight=False)
    for row in found.rows:
        out.print("  " + shlex.join([row.recipe, *row.overrides]), soft_wrap=True, highlight=False, markup=False)


def _work(found: Match) -> str:
    """What iterations are made of, one recipe a line: FLOPs follow from all three."""
    lines = []
    for row in found.rows:
        if row.iterations is not None:
            count = {name: f"{number:.3g}" for name, number in row.work.items()}
            products = f", {count['products']} products in backward" if row.work["products"] else ""
            lines.append(f"{row.recipe}: {count['evaluations']} without gradient, {count['applications']} with it{products}")
    return "\n".join(["Evaluations of f, or loops, a sequence:", *lines]) if lines else ""


def _said(found: Match) -> list[str]:
    """One line for what is matched, one for what is not."""
    apart = {name: [row.ratios[name] for row in found.rows[1:]] for name in _SIZES}
    off = max(abs(ratio - 1) for ratio in apart[found.quantity])
    others = ", ".join(f"{_SIZES[name]} {_span(ratios)}" for name, ratios in apart.items() if name != found.quantity)
    return [f"Matched: {_SIZES[found.quantity]}, to {off:.2%}.", f"Not matched, over the first: {others}."]


def _span(ratios: Sequence[float]) -> str:
    least, most = (_ratio(ratio) for ratio in (min(ratios), max(ratios)))
    return least if least == most else f"{least} to {most}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _parameters(found: Match) -> Table:
    table = _table("Parameters", "recipe", "total", "x", "matmul", "x", "embedding", "value emb.")
    for row in found.rows:
        count = {kind: si(number) for kind, number in row.parameters.items()}
        cells = [count["total"], _ratio(row.ratios["total"]), count["matmul"], _ratio(row.ratios["matmul"])]
        table.add_row(row.recipe, *cells, count["embedding"], count["value_embedding"])
    return table


def _budget(found: Match) -> Table:
    table = _table("Budget", "recipe", "iterations", "steps", "tokens", "x", "a parameter")
    for row in found.rows:
        iterations = "" if row.iterations is None else f"{row.iterations:.3g}"
        cells = [f"{row.steps:,}", si(row.tokens), _ratio(row.ratios["tokens"]), f"{row.tokens_per_parameter:.3g}"]
        table.add_row(row.recipe, iterations, *cells)
    return table


def _flops(found: Match) -> Table:
    table = _table("FLOPs", "recipe", "a token", "hardware", "the run", "x", "hardware", "x")
    for row in found.rows:
        a_token = [si(row.flops_per_token[kind]) for kind in ("model", "hardware")]
        run = [si(row.flops["model"]), _ratio(row.ratios["flops"]), si(row.flops["hardware"]), _ratio(row.ratios["hardware"])]
        table.add_row(row.recipe, *a_token, *run)
    return table
