"""`attractor train`: checks the recipe here, then trains in this process or in N local ranks of pretrain/train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import open_manifest
from launchers.local import launch
from pretrain.config import load_recipe
from pretrain.run_folder import guard

ENTRY = Path(__file__).resolve().parents[2] / "pretrain" / "train.py"

EPILOG = """\
[bold]Examples[/]

  attractor train demo data.path=data/docs

  attractor train attractor-140m data.path=data/edu train.tokens=2e9 run.dir=runs/first --procs 2

  attractor train attractor-140m data.path=data/edu train.tokens=2e9 run.dir=runs/first --procs 2 --resume

[bold]Exit codes[/]

  0  trained to the end of the token budget

  2  refused: the recipe, the data or the run folder is not as it must be; nothing was touched

  3  stopped by SIGTERM or SIGUSR1 after saving a checkpoint: continue with --resume

  4  too many non-finite steps in a row

  5  a checkpoint could not be written (disk full?); the earlier ones are whole

  130  interrupted by Ctrl-C; the last checkpoint stands

The same run by DeepSpeed's launcher: deepspeed pretrain/train.py RECIPE key=value ...
"""

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A name that `attractor plan --help` lists, such as demo, or a YAML file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes to the recipe, such as train.tokens=2e9.", show_default=False),
]


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option("--procs", min=1, help="Data-parallel processes on this machine.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint of the run folder.")] = False,
) -> None:
    """Train a recipe, on one process or several."""
    # What can be refused is refused here, before any rank starts; the ranks check again what only they can know.
    changes = list(overrides or [])
    resolved = load_recipe(recipe, changes)
    resolved.check_world(procs)
    for number, (path, _) in enumerate(resolved.sources):
        manifest = open_manifest(path, resolved.data.cache)
        for split in ("train",) if number else ("train", "validation"):  # a run evaluates on its first set
            manifest.split(split, path)
    guard(Path(resolved.run.dir), resume=resume)
    if procs == 1:
        from pretrain.train import run

        run(recipe, changes, resume)
    else:
        code = launch([str(ENTRY), recipe, *changes, *(["--resume"] if resume else [])], procs)
        if code:
            raise typer.Exit(code)
    print(f"The run is whole in {resolved.run.dir}. Next: attractor evaluate {resolved.run.dir}")
