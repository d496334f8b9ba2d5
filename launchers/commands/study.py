"""`attractor study`: a whole comparison, by name: its plan, its arms trained in order, its report; or a Slurm file of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.commands.train import Overrides
from launchers.output import console, deliver, si
from launchers.series import check, finished
from launchers.slurm import Job, array
from launchers.study import load_study, study_names
from launchers.study_arms import Arms, Entry, plan_row
from launchers.study_run import compare, evaluate, prepared, train
from pretrain.errors import Refusal
from pretrain.gpus import GPUS

FOLDER = Path("studies")

EPILOG = f"""\
[bold]Studies[/]

  {", ".join(study_names())}

[bold]Examples[/]

  attractor study 770m-vs-1.3b --gpus 64 --plan

  attractor study mini

  attractor study 770m-vs-1.3b --gpus 8 data.path=data/edu

  attractor study 770m-vs-1.3b --gpus 64 data.path=data/edu --slurm > study.sbatch

The same command again goes on: arms that have finished are not trained again. What the report holds: docs/studies.md.

[bold]Exit codes[/]

  0 the report is written; 2 refused, nothing was started; 3 stopped by a signal; else that of the first arm that failed
"""


def command(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="A name below, or a YAML file.", show_default=False)],
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", "--procs", min=1, help="GPUs (processes) of each arm.", show_default="the study's fewest")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what every arm is and costs. Starts nothing.")] = False,
    mfu: Annotated[float | None, typer.Option("--mfu", help="For GPU hours of --plan.", show_default="the study's")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the study.", show_default="studies/STUDY")] = None,
    core: Annotated[
        Path | None, typer.Option("--core", metavar="DIR", help="Evaluation bundle whose tasks all arms are asked.", show_default=False)
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print a Slurm file instead: a job an arm.")] = False,
    words: Annotated[str | None, typer.Option("--words", metavar="ARM", help="Print what `attractor train` is given for an arm.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Run a comparison of several models to its report, or say what it would cost."""
    stem, study = load_study(name)
    if mfu is not None and not 0 < mfu < 1:
        raise Refusal(f"--mfu {mfu} is no share: give one between 0 and 1, such as 0.4.")
    folder, count, changes = out or FOLDER / stem, gpus or min(study.layouts), list(overrides or [])
    arms = Arms(study, folder, count, changes)
    if plan:
        share = mfu or study.mfu
        deliver(as_json, lambda: _plan(stem, arms, share), lambda document: show_plan(document))
    elif words is not None:
        sys.stdout.writelines(f"{word}\n" for word in ready(arms, words).member.words)
    elif slurm:
        sys.stdout.write(slurm_file(name, stem, arms, core))
    else:
        deliver(as_json, lambda: _run(stem, arms, core), lambda report: _show_report(report, folder))


def _plan(name: str, arms: Arms, mfu: float) -> dict[str, Any]:
    study = arms.study
    return {
        "study": name,
        "asks": study.asks,
        "gpus": arms.gpus,
        "gpu": GPUS[study.gpu].name,
        "mfu": mfu,
        "arms": [plan_row(entry, arms.gpus, study.gpu, mfu) for entry in arms.resolve()],
    }


def _run(name: str, arms: Arms, core: Path | None) -> dict[str, Any]:
    """Data, arms, evaluations, comparison, report. What is there is not made again."""
    from launchers.study_report import make_report, write

    arms.overrides = prepared(arms.study.data, arms.out, arms.overrides)
    if arms.gpus > GPUS[arms.study.gpu].node and not all(finished(entry.member.run) for entry in arms.resolve()):
        raise Refusal(f"--gpus {arms.gpus} is more than one machine has: print the jobs of a cluster with --slurm, or give what is here.")
    entries = train(arms)
    evaluations = evaluate(entries, arms.study, core)
    report = make_report(name, arms.study, entries, evaluations, compare(entries, arms.out))
    write(report, arms.out)
    return report


def ready(arms: Arms, name: str) -> Entry:
    """The arm of that name, once its budget is known. Raises Refusal for one that there is not, or whose source has not finished."""
    entries = {entry.name: entry for entry in arms.resolve()}
    if name not in entries:
        raise Refusal(f"There is no arm {name}: there are {', '.join(entries)}.")
    source = entries[name].arm.waits_for
    if source is not None and not finished(entries[source].member.run):
        raise Refusal(f"The budget of {name} follows from {source}, which has not finished in {entries[source].member.run}.")
    check([entries[name].member], arms.gpus)
    return entries[name]


def slurm_file(name: str, stem: str, arms: Arms, core: Path | None) -> str:
    """A job an arm; one that is matched by FLOPs asks for its budget when its turn comes."""
    node = GPUS[arms.study.gpu].node
    if arms.gpus > node and arms.gpus % node:
        raise Refusal(
            f"--gpus {arms.gpus} does not fill nodes of {node} GPUs: give {arms.gpus // node * node} or {-(-arms.gpus // node) * node}."
        )
    if "data.path" not in {override.partition("=")[0] for override in arms.overrides}:
        raise Refusal("data.path is missing: jobs of a cluster prepare no data. Add data.path=FOLDER, as the cluster sees it.")
    entries = arms.resolve()
    numbers = {entry.name: number for number, entry in enumerate(entries)}
    again = ["study", name, *arms.overrides, "--gpus", str(arms.gpus), "--out", str(arms.out)]
    jobs = []
    for entry in entries:
        source, run = entry.arm.waits_for, entry.member.run
        if source is None:
            jobs.append(Job(entry.name, entry.member.words, run))
        else:
            iterates = entry.recipe.model.solves or entry.recipe.model.loops  # then those of an arm of its model are measured too
            alike = [numbers[other.name] for other in entries[: numbers[entry.name]] if iterates and other.arm.model == entry.arm.model]
            needs = tuple(sorted({numbers[source], *alike[-1:]}))
            jobs.append(Job(entry.name, [*again, "--words", entry.name], run, asks=True, needs=needs))
    table = [*again, *(["--core", str(core)] if core else [])]
    return array(stem, jobs, -(-arms.gpus // node), min(arms.gpus, node), table)


def show_plan(plan: dict[str, Any]) -> None:
    """Prints what the arms are, what is matched, what they cost, and the layouts."""
    out, where, share = console(), f"{plan['gpus']} x {plan['gpu']}", f"{plan['mfu']:.0%}"
    out.print(plan["asks"], style="bold", highlight=False)
    arms = _table("Arms", "arm", "recipe", "params", "matmul", "tokens", "per param")
    arms.columns[1].justify = "left"
    costs = _table(f"Training, on {where}", "arm", "FLOPs", "hardware", "GPU h", "model", "days", "model", "MFU")
    for row in plan["arms"]:
        counts = [si(row["parameters"]["total"]), si(row["parameters"]["matmul"]), si(row["tokens"]), f"{row['tokens_per_parameter']:.1f}"]
        arms.add_row(row["arm"], row["recipe"], *counts)
        costs.add_row(row["arm"], *_costs([row]), f"{row['modelled_mfu']:.0%}")
    costs.add_section()
    costs.add_row("all", *_costs(plan["arms"]), "")
    layouts = _table(f"Layouts on {where}", "recipe", "overrides", "step")
    layouts.columns[1].justify, layouts.columns[1].no_wrap = "left", False
    for recipe, row in {row["recipe"]: row for row in plan["arms"]}.items():
        layouts.add_row(recipe, " ".join(row["layout"]) or "as it is", f"{row['step_seconds'] * 1e3:.0f} ms")
    out.print()
    out.print(arms)
    for row in plan["arms"]:
        out.print(f"{row['arm']}: tokens {row['tokens_from']}", style="dim", highlight=False)
    for table in (costs, layouts):
        out.print()
        out.print(table)
    expected = ", ".join(f"{row['arm']} {row['iterations']:g}" for row in plan["arms"] if row["iterations"] is not None)
    out.print(
        "FLOPs: the model's, which are what is matched; hardware adds what backward computes again. Expected iterations: "
        f"{expected or 'none'}. GPU hours and days are at {share} of the peak (--mfu); in the columns `model`, by the model of step time "
        "(docs/scaling.md), whose MFU stands last.",
        style="dim",
        highlight=False,
    )


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    """FLOPs, hours and days of several arms together."""
    sums = [sum(row[what][how] for row in rows) for what in ("gpu_hours", "days") for how in ("at_mfu", "modelled")]
    counts = [si(sum(row["flops"][kind] for row in rows)) for kind in ("model", "hardware")]
    return [*counts, *(f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value > 1e-3 else f"{value:.0e}" for value in sums)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _show_report(report: dict[str, Any], folder: Path) -> None:
    """Prints the arms and the answers; the rest stands in the report."""
    from launchers.study_report import REPORT, sentence, sizes

    out, table = console(), _table(report["asks"], "arm", "params", "matmul", "tokens", "FLOPs", "loss", "perplexity")
    for name, arm in report["arms"].items():
        counts = [si(sizes(arm)[key]) for key in ("total", "matmul", "tokens")]
        table.add_row(name, *counts, si(sizes(arm)["flops"]), f"{arm['loss']:.4f}", f"{arm['perplexity']:.2f}")
    out.print(table)
    for answer in report["answers"]:
        out.print("- " + sentence(answer, report["arms"], report["documents"]["level"]).replace("**", ""), highlight=False, markup=False)
    out.print(f"\nThe report: {folder / REPORT}", highlight=False)
