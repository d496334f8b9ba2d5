"""`attractor train`: checks the recipe here, then trains in this process, in N local ranks, or on the machines of a hostfile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import open_manifest
from data_pipeline.puzzles import open_puzzles
from launchers import cluster
from launchers.hosts import meet, read_hostfile
from launchers.local import ALONE, Place, launch
from launchers.node import probe
from pretrain.config import AnyRecipe, PuzzleRecipe, load_any
from pretrain.errors import Refusal, RunStopped
from pretrain.layout import layout_on
from pretrain.run_folder import SUMMARY, guard

ENTRY = Path(__file__).resolve().parents[2] / "pretrain" / "train.py"

EPILOG = """\
[bold]Examples[/]

  attractor train demo data.path=data/docs

  attractor train sudoku-demo data.path=data/sudoku-4

  attractor train attractor-140m data.path=data/edu train.tokens=2e9 run.dir=runs/first --procs 2

  attractor train attractor-140m data.path=data/edu train.tokens=2e9 run.dir=runs/first --procs 2 --resume

  attractor train attractor-770m data.path=data/edu run.dir=runs/large --hostfile hosts

  attractor train attractor-770m data.path=data/edu run.dir=runs/large layout.tensor=4 --procs 8 --resume

[bold]Exit codes[/]

  0  trained to the end of its tokens (on puzzles: its steps)

  2  refused: the recipe, the data or the run folder is not as it must be; nothing was touched

  3  stopped by SIGTERM or SIGUSR1 after saving a checkpoint: continue with --resume

  4  too many non-finite steps in a row

  5  a checkpoint could not be written (disk full?); the earlier ones are whole

  6  ranks no longer train one model (copies of a tensor differ): continue with --resume

  7  a rank made no progress for train.hang_timeout: continue with --resume

  130  interrupted by Ctrl-C; the last checkpoint stands

The same run by DeepSpeed's launcher: deepspeed --hostfile hosts pretrain/train.py RECIPE key=value ...
Job files for Slurm and Kubernetes: attractor launch --help
"""

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A name that `attractor plan --help` lists, such as demo, or a YAML file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes to the recipe, such as train.tokens=2e9.", show_default=False),
]
_SEVERAL = "Several machines"
Hostfile = Annotated[
    Path | None,
    typer.Option("--hostfile", metavar="FILE", help="Lines `HOST slots=RANKS`; started over ssh.", rich_help_panel=_SEVERAL),
]
SshPort = Annotated[int | None, typer.Option("--ssh-port", min=1, max=65535, help="Where sshd listens.", rich_help_panel=_SEVERAL)]
MasterAddress = Annotated[
    str | None,
    typer.Option("--master-addr", help="Address of the first machine, as the others reach it.", rich_help_panel=_SEVERAL),
]
MasterPort = Annotated[
    int | None, typer.Option("--master-port", min=1, max=65535, help="Where rank 0 listens there.", rich_help_panel=_SEVERAL)
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Without ssh: machines, on each of which this is started.", rich_help_panel=_SEVERAL)
]
NodeRank = Annotated[int, typer.Option("--node-rank", min=0, help="Without ssh: which of them this is, from 0.", rich_help_panel=_SEVERAL)]


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option("--procs", min=1, help="Processes on this machine: one a GPU.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest whole checkpoint of the run folder, on this layout or another.")
    ] = False,
    hostfile: Hostfile = None,
    ssh_port: SshPort = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    nodes: Nodes = None,
    node_rank: NodeRank = 0,
) -> None:
    """Train a recipe, on one process, several, or several machines."""
    # What can be refused is refused here, before any rank starts; the ranks check again what only they can know.
    changes = list(overrides or [])
    resolved = load_any(recipe, changes)
    words = [str(ENTRY), recipe, *changes, *(["--resume"] if resume else [])]
    if hostfile is not None:
        if procs > 1 or nodes is not None:
            raise Refusal("--hostfile says how many ranks each machine takes (slots): leave out --procs, --nodes and --node-rank.")
        hosts = read_hostfile(hostfile)
        check(resolved, sum(host.slots for host in hosts), resume)
        meeting = meet(hosts, ssh_port=ssh_port, address=master_addr, port=master_port)
        code = cluster.run(words, hostfile, hosts, meeting, ssh_port)
    else:
        place = place_of(nodes, node_rank, master_addr, master_port)
        ranks = place.nodes * procs
        check(resolved, ranks, resume)
        if ranks > 1:
            code = launch(words, procs, place)
        else:
            from pretrain.train import run

            run(recipe, changes, resume)
            code = 0
    if code:
        raise typer.Exit(code)
    if node_rank == 0:
        refuse_unfinished(Path(resolved.run.dir))
        print(f"The run is whole in {resolved.run.dir}. Next: attractor evaluate {resolved.run.dir}")


def check(resolved: AnyRecipe, ranks: int, resume: bool) -> None:
    """Raises Refusal for a recipe that `ranks` ranks cannot train, data that is not there, a run folder that is not free."""
    resolved.check_world(layout_on(resolved.layout, ranks).data)
    for number, (path, _) in enumerate(resolved.sources):
        open_set = open_puzzles if isinstance(resolved, PuzzleRecipe) else open_manifest
        manifest = open_set(path, resolved.data.cache)
        for split in ("train",) if number else ("train", "validation"):  # a run evaluates on its first set
            manifest.split(split, path)
    guard(Path(resolved.run.dir), resume=resume)


def refuse_unfinished(run: Path) -> None:
    """Raises RunStopped (code 1) for a run whose launcher ended well and which did not: one that was killed itself says nothing of it."""
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8")) if (run / SUMMARY).exists() else {}
    if summary.get("step") != summary.get("total_steps"):
        raise RunStopped(
            f"The launcher ended without an error, but the run in {run} stands at step {summary['step']} of {summary['total_steps']}: it "
            f"was most likely killed. See that no rank of it still runs, then go on with --resume.",
            1,
        )


def place_of(nodes: int | None, node_rank: int, address: str | None, port: int | None) -> Place:
    """This machine among `nodes`. Raises Refusal where it cannot be known, or where rank 0 could not listen."""
    if nodes is None:
        if node_rank or address or port:
            raise Refusal("--node-rank, --master-addr and --master-port are for a run on several machines: add --nodes, or --hostfile.")
        return ALONE
    if node_rank >= nodes:
        raise Refusal(f"--node-rank {node_rank} is none of --nodes {nodes}: they are counted from 0 to {nodes - 1}.")
    if address is None or port is None:
        raise Refusal(f"--nodes {nodes} needs --master-addr and --master-port: where on node 0 its rank 0 listens for the others.")
    if node_rank == 0 and probe(port)["port"] is None:
        raise Refusal(f"Port {port} is in use on this machine, where rank 0 would listen on it: give all nodes another --master-port.")
    return Place(node_rank, nodes, address, port)
