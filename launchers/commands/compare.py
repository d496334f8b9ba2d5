"""`attractor compare`: runs side by side, with what is matched between them and what is not."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, fraction_bar

EPILOG = """\
[bold]Examples[/]

  attractor compare runs/demo runs/demo-transformer --out runs/compared

  attractor compare runs/a runs/b runs/c --out report --no-evaluate

  attractor compare runs/a runs/b --out report --json

Writes compare.md, compare.json and plots into --out. Which runs can be compared, and how each figure is made: docs/comparing.md
"""

_LABEL, _CELL, _GAP = 28, 17, 3  # columns of the terminal for a row's name and for a run, with what is between


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Two run folders or more; the first is what the others are held against.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report; made where there is none.", show_default=False)],
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Evaluate the newest checkpoints on the whole validation split, for intervals by document; kept in --out. Without: "
            "records alone, no torch.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Compare runs: losses, what they cost, where one reaches the other's loss, and what is matched."""

    def compute() -> dict[str, Any]:
        from pretrain.compare import compare_runs

        with fraction_bar("evaluating" if evaluate else "comparing") as report:
            return compare_runs(runs, out, evaluate=evaluate, progress=report)

    deliver(as_json, compute, lambda document: _show(document, out))


def _show(document: dict[str, Any], out: Path) -> None:
    from pretrain.compare_report import RATIO_NOTE, crossing_rows, interval_note, interval_rows, smoothing_note

    terminal, numbers = console(), {run["name"]: str(number) for number, run in enumerate(document["runs"], 1)}
    for run in document["runs"]:
        state = "" if run["finished"] else f" (unfinished: step {run['step']:,} of {run['total_steps']:,})"
        terminal.print(f"{numbers[run['name']]}  {run['name']}{state}", highlight=False, markup=False)
    columns = max(1, (min(terminal.width, 100) - _LABEL) // _CELL)
    for start in range(0, len(numbers), columns):
        terminal.print(_sides(document, numbers, start, columns))
    terminal.print(smoothing_note(document["smoothing"]), style="dim", highlight=False)
    shown = False
    for curve, title in (("validation", "Final validation loss, own depth"), ("training", "Final smoothed training loss")):
        if cells := crossing_rows(document, curve):
            terminal.print(f"\n{title}: where a run reaches another's", style="italic")
            terminal.print(_pairs(cells, numbers, *_AT))
            shown = True
    if shown:
        terminal.print(RATIO_NOTE, style="dim", highlight=False)
    if document["documents"] is not None:
        terminal.print("\nDifference of loss on the whole validation split, nats a token", style="italic")
        terminal.print(_pairs(interval_rows(document), numbers, "minus", "difference", "from", "to"))
        terminal.print(interval_note(document["documents"]), style="dim", highlight=False)
    terminal.print()
    for said in document["findings"]:
        terminal.print(f"- {said}", highlight=False, markup=False)
    terminal.print(
        f"\nReport: {out / 'compare.md'}    Plots: {', '.join(document['plots'])}", highlight=False, markup=False, soft_wrap=True
    )


_AT = ("reaches", "loss", "tokens", "ratio", "FLOPs", "ratio", "seconds", "ratio")


def _sides(document: dict[str, Any], numbers: dict[str, str], start: int, columns: int) -> Table:
    """The runs start ... start + columns - 1 beside each other."""
    from pretrain.compare_report import rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in list(numbers)[start : start + columns]:
        head = textwrap.fill(name, _CELL - _GAP)  # breaks at hyphens, which rich does not
        table.add_column(f"{numbers[name]}\n{head}", justify="right", no_wrap=True)
    for what, cells in rows(document):
        own = cells[start : start + columns]
        if any(own) or not cells:
            table.add_row(what, *own, style=None if cells else "bold")
    return table


def _pairs(body: list[list[str]], numbers: dict[str, str], *columns: str) -> Table:
    """A row an ordered pair; the first two cells are runs, by number."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("run", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for run, other, *cells in body:
        table.add_row(numbers[run], numbers[other], *cells)
    return table
