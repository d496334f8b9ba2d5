"""`attractor evaluate`: a run's losses by solver iterations, what its solve does token by token, and how it does in tasks.

A run on puzzles is told by its recipe and has reports of its own (launchers/puzzle_evaluate.py). docs/evaluation.md and docs/puzzles.md
say what each figure is; launchers/evaluate_report.py shows those of language models.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.evaluate_report import show_core, show_internalization, show_losses, show_solvers, show_tasks
from launchers.output import deliver, fraction_bar
from launchers.puzzle_evaluate import evaluate_puzzles, is_of_puzzles, refuse_other_regime
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor evaluate runs/demo

  attractor evaluate runs/demo --solver-iterations 0,1,8,auto --json

  attractor evaluate runs/demo --internalization

  attractor evaluate runs/demo --tasks lambada_openai,blimp --limit 200

  attractor evaluate exports/demo --tasks lambada_openai --through hf

  attractor evaluate runs/demo --core eval_bundle --max-per-task 200

  attractor evaluate runs/sudoku-demo --steps 1,4,16,64 --solver-iterations 0,1,auto

  attractor evaluate runs/sudoku-demo --draw 4
"""

Iterations = list[int | str]
REPORTS = ("--solvers", "--internalization", "--tasks", "--core")
"""Of a language model, in place of its losses."""
GOES_WITH = {
    **dict.fromkeys(("--through", "--tasks-dir", "--tasks-data", "--batch"), "--tasks"),
    **dict.fromkeys(("--limit", "--out"), "--tasks and --internalization"),
    "--max-per-task": "--core",
}
"""Options that belong to some of them."""


class Through(StrEnum):
    """Who runs the model in lm-eval's tasks."""

    attractor = "attractor"
    hf = "hf"


def parse_iterations(text: str) -> Iterations:
    """`0,1,auto` -> [0, 1, "auto"]. Raises Refusal for anything else."""
    values: Iterations = []
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


def one_depth(report: str, iterations: Iterations | None) -> int | str | None:
    """The one depth at which tasks are asked; None for the model's own. Raises Refusal for several."""
    if iterations is not None and len(iterations) > 1:
        named = ",".join(map(str, iterations))
        raise Refusal(
            f"{report} asks at one depth, and --solver-iterations {named} names {len(iterations)}: give one, such as auto, or none."
        )
    return iterations[0] if iterations else None


def refuse_strangers(report: str | None, given: dict[str, tuple[str, object]]) -> None:
    """Raises Refusal for an option of a report that was not asked for. given: option -> (its reports, its value)."""
    for option, (reports, value) in given.items():
        if value is not None and report not in reports.split(" and "):
            raise Refusal(f"{option} goes with {reports}, which is not given. Leave it out, or ask for that report.")


def command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run folder, such as runs/demo.", show_default=False)],
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
    internalization: Annotated[
        bool, typer.Option("--internalization", help="Report instead how near proposal and equilibrium are, token by token. Draws a PNG.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Run tasks of lm-eval instead, on a run or an export.", show_default=False),
    ] = None,
    core: Annotated[
        Path | None,
        typer.Option(
            "--core",
            metavar="DIR",
            help="Ask the in-context tasks of an evaluation bundle instead (core.yaml, eval_data/, eval_meta_data.csv), at one depth.",
            show_default=False,
        ),
    ] = None,
    through: Annotated[
        Through | None,
        typer.Option("--through", help="With --tasks: our model class, or lm-eval's hf on an export.", show_default="attractor"),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", metavar="DIR", help="With --tasks: task files of your own (YAML).", show_default=False)
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option("--tasks-data", metavar="DIR", help="With --tasks: files of local_* tasks.", show_default="$ATTRACTOR_DATA/evals"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="With --tasks: documents a task; with --internalization: windows.", show_default="all"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", metavar="N", min=1, help="With --tasks, and on puzzles: rows at a time.", show_default="what fits; the recipe's"
        ),
    ] = None,
    max_per_task: Annotated[
        int | None, typer.Option("--max-per-task", metavar="N", min=1, help="With --core: examples a task at most.", show_default="all")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="With --tasks, --internalization and --draw: where files go.", show_default="into the run"
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="1,4,...", help="Puzzles: report after so many supervision steps.", show_default="the recipe's"),
    ] = None,
    breadth: Annotated[
        str | None,
        typer.Option(
            "--breadth", metavar="1,4,...", help="Puzzles: choose among so many random starts by their residual.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="Puzzles: the validation split of another prepared set.", show_default="the run's own"),
    ] = None,
    puzzles: Annotated[
        int | None, typer.Option("--puzzles", metavar="N", min=1, help="Puzzles: how many at most, evenly spread.", show_default="all")
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option("--draw", metavar="N", min=1, help="Puzzles: draw N of them instead, step by step (PNG).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Report a run's validation loss by solver iterations, what its solve does token by token, how it does in tasks or on puzzles."""
    iterations = None if solver_iterations is None else parse_iterations(solver_iterations)
    if not run.is_dir():
        raise Refusal(f"{run} is not a run folder: give the folder that `attractor train` wrote (run.dir), such as runs/demo.")
    options = {f"--{name.replace('_', '-')}": value for name, value in context.params.items()}
    of_puzzles = is_of_puzzles(run)
    refuse_other_regime(run, options, puzzles=of_puzzles)
    if of_puzzles:
        evaluate_puzzles(run, options, iterations, as_json)
    else:
        evaluate_language(run, options, iterations, as_json)


def evaluate_language(run: Path, options: dict[str, Any], iterations: Iterations | None, as_json: bool) -> None:
    """The report of a language model that the options, by their names, ask for. Raises Refusal for options that do not go together."""
    reports = [option for option in REPORTS if options[option] not in (None, False)]
    if len(reports) > 1:
        raise Refusal(f"{' and '.join(reports)} are {len(reports)} reports: ask for one at a time.")
    report = reports[0] if reports else None
    refuse_strangers(report, {option: (goes_with, options[option]) for option, goes_with in GOES_WITH.items()})
    limit, out = options["--limit"], options["--out"]
    if report == "--tasks":
        names = [name.strip() for name in options["--tasks"].split(",") if name.strip()]
        settings = {name: options[f"--{name.replace('_', '-')}"] for name in ("tasks_dir", "tasks_data", "limit", "batch", "out")}
        settings["solver_iterations"] = one_depth("--tasks", iterations)
        through = (options["--through"] or Through.attractor).value
        deliver(as_json, lambda: _tasks(run, names, through, settings), show_tasks)
    elif report == "--core":
        depth = one_depth("--core", iterations)
        deliver(as_json, lambda: _core(run, options["--core"], depth, options["--max-per-task"]), show_core)
    elif report == "--solvers":
        deliver(as_json, lambda: _solvers(run), show_solvers)
    elif report == "--internalization":
        deliver(as_json, lambda: _internalization(run, iterations, limit, out), show_internalization)
    else:
        deliver(as_json, lambda: _losses(run, iterations), show_losses)


def _losses(run: Path, iterations: Iterations | None) -> dict[str, Any]:
    from pretrain.evaluate import evaluate_run

    with fraction_bar("evaluating") as report:
        return evaluate_run(run, iterations, progress=report)


def _solvers(run: Path) -> list[dict[str, Any]]:
    from pretrain.solvers import compare_solvers

    return compare_solvers(run)


def _core(run: Path, bundle: Path, depth: int | str | None, limit: int | None) -> dict[str, Any]:
    from pretrain.downstream.core_tasks import evaluate_core_run

    with fraction_bar("asking") as report:
        return evaluate_core_run(run, bundle, depth, limit, progress=report)


def _tasks(path: Path, names: list[str], through: str, settings: dict[str, Any]) -> dict[str, Any]:
    from pretrain.downstream.harness_tasks import evaluate_tasks

    if not names:
        raise Refusal("--tasks names no task: write names with commas between them, such as lambada_openai,blimp.")
    return evaluate_tasks(path, names, through=through, **settings)


def _internalization(run: Path, iterations: Iterations | None, limit: int | None, out: Path | None) -> dict[str, Any]:
    from pretrain.downstream.internalization import DEPTHS, report_internalization

    depths = DEPTHS if iterations is None else [depth for depth in iterations if isinstance(depth, int)]
    with fraction_bar("solving") as report:
        return report_internalization(run, out or run, depths, limit, progress=report)
