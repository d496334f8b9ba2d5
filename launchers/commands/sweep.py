"""`attractor sweep`: the members of a sweep trained one after another, and their table; or a Slurm array of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.commands.train import Recipe
from launchers.output import console, print_note
from launchers.series import Member, check, completed, finished, naming, one_after_another
from launchers.slurm import Job, array
from launchers.sweep import Sweep, make_sweep, value_text, write
from launchers.sweep_rows import COLUMNS, cells, row
from pretrain.config import AnyRecipe, sweep_names
from pretrain.errors import RunStopped

EPILOG = f"""\
[bold]Sweeps that ship with the project[/]

  {", ".join(sweep_names())}

[bold]Examples[/]

  attractor sweep ablation-injection data.path=data/edu

  attractor sweep demo attractor.injection=additive,concat gradient.mode=one_step,adjoint data.path=data/docs

  attractor sweep demo solver.tolerance=1e-2,1e-3 data.path=data/docs --plan

  attractor sweep sudoku-demo train.seed=0,1,2 model.width=64,128 data.path=data/sudoku

  attractor sweep attractor-140m optimizer.lr=4e-3,8e-3 data.path=data/edu --slurm --procs 8 > sweep.sbatch

The same command again skips members that have finished and resumes those that were interrupted.

[bold]Exit codes[/]

  0 all finished; 2 refused, nothing was started; 3 stopped by a signal; else that of the first member that failed (see attractor train)
"""

Axes = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value,value,...", help="Values to try, and changes for all members.", show_default=False),
]


def command(
    recipe: Recipe,
    overrides: Axes = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the sweep.", show_default="sweeps/RECIPE")] = None,
    procs: Annotated[int, typer.Option("--procs", min=1, help="Processes of each member on this machine: one a GPU.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be trained, and what it costs. Starts nothing.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print a Slurm array instead: a job a member, --procs GPUs each.")] = False,
) -> None:
    """Train a recipe with every combination of several values, one after another."""
    sweep = make_sweep(recipe, overrides or [], out)
    if plan:
        recipes = planned(sweep.members)
        _show(sweep, [row(*parts) for parts in zip(sweep.settings, sweep.members, recipes, strict=True)])
        return
    recipes = check(sweep.members, procs)
    if slurm:
        jobs = [Job(member.name, member.words, member.run) for member in sweep.members]
        table = ["sweep", recipe, *(overrides or []), "--procs", str(procs), "--out", str(sweep.out)]
        sys.stdout.write(array(sweep.name, jobs, 1, procs, table))
        return
    codes = _train(sweep, procs)
    rows = [row(*parts) for parts in zip(sweep.settings, sweep.members, recipes, codes, strict=True)]
    path = write(sweep, rows)
    _show(sweep, rows)
    console().print(f"The same table: {path}", highlight=False)
    failed = {member.name: code for member, code in zip(sweep.members, codes, strict=True) if code}
    if failed:
        said = "; ".join(f"{name} (code {code})" for name, code in failed.items())
        raise RunStopped(
            f"{len(failed)} of {len(codes)} members did not finish: {said}. What they said is above; the same command tries them again.",
            next(iter(failed.values())),
        )


def planned(members: list[Member]) -> list[AnyRecipe]:
    """The recipes, with what the data decides where a path is given. Raises Refusal that names the member."""
    recipes = []
    for member in members:
        recipe = member.load()
        with naming(member.name):
            recipes.append(completed(recipe))
    return recipes


def _train(sweep: Sweep, procs: int) -> list[int]:
    codes = []
    with one_after_another(procs) as train:
        for number, member in enumerate(sweep.members, 1):
            state = "has finished already" if finished(member.run) else "trains"
            print_note(f"[{number}/{len(sweep.members)}] {member.name} {state} in {member.run}")
            codes.append(train(member))
    return codes


_SHORT = {
    **{"parameters": "params", "in matmuls": "matmul", "perplexity": "ppl", "iterations": "iters"},
    **{"converged": "conv.", "seconds": "s"},
}
"""Of `COLUMNS`, so that the table fits a terminal."""


def _show(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    """The table, without the columns that are the same (or empty) in all rows, which stand below it, and members that have not finished."""
    out = console()
    table = Table(title=f"Sweep {sweep.name}", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    texts, columns = [cells(found) for found in rows], list(COLUMNS[rows[0]["regime"]])
    same = {name for name in columns if len(rows) > 1 and len({text[name] for text in texts}) == 1} | {"state"}
    shown = [name for name in columns if name not in same]
    for key in sweep.settings[0]:
        table.add_column(key.rpartition(".")[2].replace("_", " "))
    for name in shown:
        table.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    for found, text in zip(rows, texts, strict=True):
        table.add_row(*map(value_text, found["settings"].values()), *(text[name] for name in shown))
    out.print(table)
    common = [f"{name} {texts[0][name]}" for name in columns if name in same and name != "state" and texts[0][name]]
    if common:
        out.print(f"The same in all: {', '.join(common)}.", style="dim", highlight=False)
    for found in rows:
        if found["state"] != "finished":
            out.print(f"{found['member']}: {found['state']}", style="dim", highlight=False, soft_wrap=True)
