"""`attractor launch slurm|k8s|hostfile`: a job file for a cluster, from the templates beside this folder, checked like a plan.

A layout that the recipe, or so many GPUs, cannot have is refused before anything is rendered. Templates are string.Template
with @ for $, which belongs to shells.
"""

from __future__ import annotations

import re
import shlex
import string
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.commands.train import ENTRY, Overrides, Recipe
from launchers.output import print_note
from pretrain.config import load_any
from pretrain.errors import Refusal
from pretrain.layout import layout_on

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
_FAILURES_A_NODE = 10
_LONGEST_NAME = 50
"""Of a Kubernetes job: its pods' names add an index, and must fit in 63 characters."""

_EXAMPLE = """\
[bold]Example[/]

  attractor launch {kind} attractor-140m data.path=data/edu train.micro_batch=16 --nodes 2
"""

app = typer.Typer(
    no_args_is_help=True,
    help="Write the job file of a run on a cluster.\n\nExample: attractor launch slurm attractor-140m --nodes 1 --gpus-per-node 8 --print",
)

Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines.")]
Gpus = Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of each: a rank each.")]
Print = Annotated[bool, typer.Option("--print", help="Print it, and write no file.")]


class Sheet(string.Template):
    """A template whose placeholders begin with @."""

    delimiter = "@"


def render(kind: str, recipe: str, overrides: list[str], nodes: int, gpus: int) -> tuple[str, str]:
    """File name and text of a job. Raises Refusal for what cannot run there."""
    resolved = load_any(recipe, overrides)
    layout = layout_on(resolved.layout, nodes * gpus)
    resolved.check_world(layout.data)
    if any("\n" in word for word in (recipe, *overrides)):
        raise Refusal("An override holds a line break, which a job file cannot carry: put it into a recipe file.")
    name = re.sub(r"[^a-z0-9]+", "-", resolved.run.name.lower()).strip("-")[:_LONGEST_NAME].strip("-") or "attractor"
    template, file = {
        "slurm": ("slurm.sh", f"{name}.sbatch"),
        "k8s": ("kubernetes.yaml", f"{name}.k8s.yaml"),
        "hostfile": ("hostfile.txt", f"{name}.hosts"),
    }[kind]
    values: dict[str, Any] = {
        "name": name,
        "file": file,
        "nodes": nodes,
        "gpus": gpus,
        "layout": f"{layout.describe()}, ZeRO {resolved.layout.zero}",
        "words": shlex.join([recipe, *overrides]),
        "run_dir": shlex.quote(resolved.run.dir),
        "python": shlex.quote(sys.executable),
        "entry": shlex.quote(str(ENTRY)),
        "failures": _FAILURES_A_NODE * nodes,
        "hosts": "\n".join(f"node-{number} slots={gpus}" for number in range(1, nodes + 1)),
    }
    return file, Sheet((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def deliver(kind: str, recipe: str, overrides: list[str] | None, nodes: int, gpus: int, print_only: bool) -> None:
    """Prints the job, or writes it into the current folder. Raises Refusal rather than overwrite a file."""
    file, text = render(kind, recipe, list(overrides or []), nodes, gpus)
    if print_only:
        sys.stdout.write(text)
    else:
        try:
            with open(file, "x", encoding="utf-8") as job:
                job.write(text)
        except FileExistsError as error:
            raise Refusal(f"{file} exists already and is not overwritten: move it away, or use --print and > another file.") from error
        print(f"Written: {file}. Its first lines say how to start it.")
    if load_any(recipe, overrides or []).data.path is None:
        print_note("data.path is not set: add data.path=FOLDER, as the cluster sees it, or the ranks will refuse to start.")


@app.command("slurm", epilog=_EXAMPLE.format(kind="slurm"))
def slurm(recipe: Recipe, overrides: Overrides = None, nodes: Nodes = 1, gpus: Gpus = 8, print_only: Print = False) -> None:
    """An sbatch script: a task a GPU, saves before its time is up, requeues itself."""
    deliver("slurm", recipe, overrides, nodes, gpus, print_only)


@app.command("k8s", epilog=_EXAMPLE.format(kind="k8s"))
def k8s(recipe: Recipe, overrides: Overrides = None, nodes: Nodes = 1, gpus: Gpus = 8, print_only: Print = False) -> None:
    """A Kubernetes manifest: an indexed Job, a pod a machine, and its Service."""
    deliver("k8s", recipe, overrides, nodes, gpus, print_only)


@app.command("hostfile", epilog=_EXAMPLE.format(kind="hostfile"))
def hostfile(recipe: Recipe, overrides: Overrides = None, nodes: Nodes = 1, gpus: Gpus = 8, print_only: Print = False) -> None:
    """A hostfile to fill in, with the commands that use it."""
    deliver("hostfile", recipe, overrides, nodes, gpus, print_only)
