"""`attractor evaluate`: validation loss of a run by solver iterations, and how near the proposal is to the equilibrium."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, fraction_bar
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor evaluate runs/demo

  attractor evaluate runs/demo --solver-iterations 0,1,8,auto --json

  attractor evaluate runs/demo --solvers
"""


def parse_iterations(text: str) -> list[int | str]:
    """`0,1,auto` -> [0, 1, "auto"]. Raises Refusal for anything else."""
    values: list[int | str] = []
    for word in (part.strip() for part in text.split(",")):
        if word in ("auto", "strict"):
            values.append(word)
        elif word.isdecimal():
            values.append(int(word))
        else:
            raise Refusal(
                f"`{word}` in --solver-iterations {text} is no number of solver iterations: write numbers from 0, auto or strict, "
                "such as 0,1,2,4,auto."
            )
    return values


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.", show_default=False)],
    solver_iterations: Annotated[
        str | None,
        typer.Option(
            "--solver-iterations",
            metavar="0,1,...,auto",
            help="Report a loss at each: 0 decodes the proposal, auto solves to the tolerance, strict as generation would.",
            show_default="the recipe's",
        ),
    ] = None,
    solvers: Annotated[
        bool, typer.Option("--solvers", help="Compare kinds of solver instead: evaluations, seconds, loss, and what later tokens leak.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Report a run's validation loss by solver iterations."""
    iterations = None if solver_iterations is None else parse_iterations(solver_iterations)
    if not run.is_dir():
        raise Refusal(f"{run} is not a run folder: give the folder that `attractor train` wrote (run.dir), such as runs/demo.")

    if solvers:
        deliver(as_json, lambda: _compare(run), _show_solvers)
        return

    def compute() -> dict[str, Any]:
        from pretrain.evaluate import evaluate_run

        with fraction_bar("evaluating") as report:
            return evaluate_run(run, iterations, progress=report)

    deliver(as_json, compute, _show)


def _compare(run: Path) -> list[dict[str, Any]]:
    from pretrain.solvers import compare_solvers

    return compare_solvers(run)


def _show_solvers(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver")
    for column in ("evaluations", "seconds", "loss", "leak"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["solver"], f"{row['evaluations']:.2f}", f"{row['solve_seconds']:.3f}", f"{row['loss']:.4f}", f"{row['leak']:.1e}")
    out = console()
    out.print(table)
    out.print("seconds: of the solve of one batch.")
    out.print("leak: relative change of the first three quarters of the states when the last quarter of the tokens is replaced.")


def _show(result: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{result['run']}[/]: step {result['step']}, {result['tokens']:,} predicted tokens", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("solver iterations", "loss", "perplexity", "mean iterations used"):
        table.add_column(column, justify="right")
    used = result.get("iterations", {})
    for depth, loss in result["loss"].items():
        table.add_row(depth, f"{loss:.4f}", f"{result['perplexity'][depth]:.2f}", f"{used[depth]:.2f}" if depth in used else "")
    out.print(table)
    if "proposal_distance" in result:
        distance, converged = result["proposal_distance"], 100 * result["converged"]
        out.print(f"||y* - y0|| / ||y0|| = {distance:.3g}; {converged:.1f} % of sequences within the tolerance.", highlight=False)
