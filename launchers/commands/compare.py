"""`attractor compare`: runs side by side, with what is matched between them and what is not. Of puzzles by arms: seeds are one."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, fraction_bar
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor compare runs/demo runs/demo-transformer --out runs/compared

  attractor compare runs/a runs/b runs/c --out report --no-evaluate

  attractor compare runs/a runs/b --out report --json

  attractor compare sweeps/sudoku-demo/seed=* --out report --accuracy 0.8

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
            "records alone, no torch, which is how runs on puzzles are always compared.",
        ),
    ] = True,
    accuracy: Annotated[
        float | None,
        typer.Option("--accuracy", metavar="SHARE", help="Puzzles: also tell the steps to this share of them solved.", show_default="0.5"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Compare runs: what each reached, what it cost, where one reaches the other's loss, and what is matched."""
    from pretrain.reasoning.compare_records import are_puzzles

    if are_puzzles(runs):
        from pretrain.reasoning.compare import ACCURACY, compare_puzzle_runs

        share = ACCURACY if accuracy is None else accuracy
        deliver(as_json, lambda: compare_puzzle_runs(runs, out, accuracy=share), lambda document: show_puzzles(document, out))
        return
    if accuracy is not None:
        raise Refusal("--accuracy is for runs on puzzles, and these are of language models: leave it out.")

    def compute() -> dict[str, Any]:
        from pretrain.compare import compare_runs

        with fraction_bar("evaluating" if evaluate else "comparing") as report:
            return compare_runs(runs, out, evaluate=evaluate, progress=report)

    deliver(as_json, compute, lambda document: _show(document, out))


def show_puzzles(document: dict[str, Any], out: Path) -> None:
    """The tables of arms, and what can be said."""
    from pretrain.reasoning import compare_report as report

    terminal, valid = console(), ("valid",) * report.has_valid(document)
    notes = (report.NOTE.format(accuracy=100 * document["accuracy"]), report.COST_NOTE)
    columns = (report.ACCURACY_COLUMNS[:4] + valid + report.ACCURACY_COLUMNS[4:], report.COST_COLUMNS)
    titles = (f"Accuracy in %, on {document['data']['evaluated_puzzles']:,} validation puzzles, {document['data']['game']}", "Cost")
    for number, arm in enumerate(document["arms"], 1):
        terminal.print(f"{number}  {report.label(arm)}: {arm['kind']}", highlight=False, markup=False)
    for title, names, rows, note in zip(titles, columns, (report.accuracy_rows, report.cost_rows), notes, strict=True):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        body = rows(document)
        shown = [column for column, name in enumerate(names) if name != "kind" and any(row[column] for row in body)]
        for column in shown:
            table.add_column(names[column], justify="right" if column else "left")
        for number, row in enumerate(body, 1):
            table.add_row(str(number), *(row[column] for column in shown[1:]))
        terminal.print(f"\n{title}", style="italic", highlight=False)
        terminal.print(table)
        terminal.print(note, style="dim", highlight=False)
    _end(document, out)


def _end(document: dict[str, Any], out: Path) -> None:
    """What can be said, and where the rest is."""
    terminal = console()
    terminal.print()
    for said in document["findings"]:
        terminal.print(f"- {said}", highlight=False, markup=False)
    terminal.print(
        f"\nReport: {out / 'compare.md'}    Plots: {', '.join(document['plots'])}", highlight=False, markup=False, soft_wrap=True
    )


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
    _end(document, out)


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
