"""`attractor evaluate`: a run's validation loss and bits per byte by solver iterations, and how it does in the tasks of CORE.

docs/evaluation.md says what each figure is.
"""

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

  attractor evaluate runs/demo --core eval_bundle --max-per-task 200
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


def one_depth(iterations: list[int | str] | None, text: str | None) -> int | str | None:
    """The one depth at which tasks are asked; None for the run's own. Raises Refusal for several."""
    if iterations is not None and len(iterations) > 1:
        raise Refusal(f"--core asks at one depth, and --solver-iterations {text} names {len(iterations)}: give one, such as auto, or none.")
    return iterations[0] if iterations else None


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
    core: Annotated[
        Path | None,
        typer.Option(
            "--core",
            metavar="DIR",
            help="Ask the in-context tasks of an evaluation bundle instead (core.yaml, eval_data/, eval_meta_data.csv), at one depth.",
            show_default=False,
        ),
    ] = None,
    max_per_task: Annotated[
        int | None, typer.Option("--max-per-task", metavar="N", min=1, help="With --core: examples a task at most.", show_default="all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Report a run's validation loss by solver iterations, or how it does in the tasks of CORE."""
    iterations = None if solver_iterations is None else parse_iterations(solver_iterations)
    if not run.is_dir():
        raise Refusal(f"{run} is not a run folder: give the folder that `attractor train` wrote (run.dir), such as runs/demo.")

    if core is None and max_per_task is not None:
        raise Refusal("--max-per-task bounds the examples of --core, which is not given. Leave it out, or name a bundle with --core.")
    if core is not None:
        if solvers:
            raise Refusal("--core and --solvers are two reports: ask for one at a time.")
        depth = one_depth(iterations, solver_iterations)
        deliver(as_json, lambda: _core(run, core, depth, max_per_task), _show_core)
        return
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


def _core(run: Path, bundle: Path, depth: int | str | None, limit: int | None) -> dict[str, Any]:
    from pretrain.core_tasks import evaluate_core_run

    with fraction_bar("asking") as report:
        return evaluate_core_run(run, bundle, depth, limit, progress=report)


def _show_core(result: dict[str, Any]) -> None:
    out = console()
    bound = "" if result["max_per_task"] is None else f", at most {result['max_per_task']} examples a task"
    out.print(f"[bold]{result['run']}[/]: step {result['step']}, depth {result['depth']}{bound}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    for column in ("shots", "examples", "accuracy", "baseline", "centred"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in result["tasks"]:
        figures = (f"{task[name]:.4f}" for name in ("accuracy", "baseline", "centred"))
        table.add_row(task["label"], str(task["fewshot"]), f"{task['examples']:,}", *figures)
    table.add_section()
    table.add_row("CORE", "", "", "", "", f"[bold]{result['core']:.4f}[/]")
    out.print(table)
    if cut := [task["label"] for task in result["tasks"] if task["cut"]]:
        most = max(task["cut"] for task in result["tasks"])
        out.print(
            f"Cut on the left to fit the sequence length: up to {100 * most:.0f} % of the prompts in {len(cut)} task(s).", highlight=False
        )


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
    for column in ("solver iterations", "loss", "perplexity", "bits per byte", "mean iterations used"):
        table.add_column(column, justify="right")
    used, bits = result.get("iterations", {}), result.get("bits_per_byte", {})
    for depth, loss in result["loss"].items():
        of_bytes = f"{bits[depth]:.4f}" if depth in bits else ""
        table.add_row(depth, f"{loss:.4f}", f"{result['perplexity'][depth]:.2f}", of_bytes, f"{used[depth]:.2f}" if depth in used else "")
    out.print(table)
    if "proposal_distance" in result:
        distance, converged = result["proposal_distance"], 100 * result["converged"]
        out.print(f"||y* - y0|| / ||y0|| = {distance:.3g}; {converged:.1f} % of sequences within the tolerance.", highlight=False)
