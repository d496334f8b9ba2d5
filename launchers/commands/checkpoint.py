"""`attractor checkpoint`: what checkpoints a run has, whether they are whole, and one of them for another layout.

docs/checkpoints.md says what a checkpoint holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, fraction_bar, si, size
from pretrain.errors import Refusal

app = typer.Typer(help="List, verify and convert the checkpoints of a run.", no_args_is_help=True)

_LS_EPILOG = """\
[bold]Example[/]

  attractor checkpoint ls runs/large
"""

_VERIFY_EPILOG = """\
[bold]Examples[/]

  attractor checkpoint verify runs/large

  attractor checkpoint verify runs/large --step 2000 --json
"""

_CONVERT_EPILOG = """\
[bold]Examples[/]

  attractor checkpoint convert runs/large --layout tensor=1,pipeline=2,data=2 --out runs/large-on-4

  attractor train runs/large-on-4/config.yaml --procs 4 --resume

A run may also be resumed on another layout as it is: attractor train RECIPE layout.tensor=2 ... --procs N --resume
"""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command("ls", epilog=_LS_EPILOG)
def ls(run: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints: step, size, layout, tokens, loss, which one --resume takes."""
    from pretrain.checkpoint_listing import listing

    deliver(as_json, lambda: listing(run), _show_listing)


@app.command("verify", epilog=_VERIFY_EPILOG)
def verify(
    run: Run,
    step: Annotated[int | None, typer.Option("--step", metavar="N", min=0, help="That one alone.", show_default="all")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a run's checkpoints against its hash; exit code 2 names what is damaged."""

    def compute() -> dict[str, Any]:
        from pretrain.checkpoint_listing import verify_run

        with fraction_bar("hashing") as report:
            return verify_run(run, step, progress=report)

    deliver(as_json, compute, _show_verified)


@app.command("convert", epilog=_CONVERT_EPILOG)
def convert(
    run: Run,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="tensor=1,pipeline=2,...",
            help="tensor, pipeline and data (1 each unless said), zero, sequence_parallel and micro_batch (the run's unless said).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RUN2", help="Make a new run there, and leave RUN as it is.", show_default="in place")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's newest whole checkpoint in the form of no layout, and set the run's recipe to another layout."""
    wanted = parse_layout(layout)

    def compute() -> dict[str, Any]:
        from pretrain.convert import convert as convert_run

        with fraction_bar("converting") as report:
            return convert_run(run, wanted, out, progress=report)

    deliver(as_json, compute, _show_converted)


def parse_layout(text: str) -> dict[str, int | bool]:
    """`tensor=2,zero=1` -> {"tensor": 2, "zero": 1}. Raises Refusal for anything else."""
    numbers, words = ("tensor", "pipeline", "data", "zero", "micro_batch"), {"true": True, "false": False}
    wanted: dict[str, int | bool] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key in wanted:
            raise Refusal(f"--layout {text} names {key} twice.")
        if key in numbers and value.isdecimal() and (int(value) > 0 or key == "zero"):
            wanted[key] = int(value)
        elif key == "sequence_parallel" and value in words:
            wanted[key] = words[value]
        else:
            raise Refusal(
                f"`{part.strip()}` in --layout {text} is no part of a layout: write {', '.join(f'{name}=N' for name in numbers)} or "
                f"sequence_parallel=true, joined by commas, such as tensor=2,pipeline=2,data=1,zero=1."
            )
    return wanted


def _layout(layout: dict[str, int] | None) -> str:
    if layout is None:
        return ""
    if not layout:
        return "any"
    if "pipeline" not in layout:
        return f"{layout['world_size']} rank(s), ZeRO {layout['zero']}"
    parts = [f"{short}{layout[name]}" for name, short in (("pipeline", "pp"), ("data", "dp"), ("tensor", "tp")) if layout.get(name, 1) > 1]
    return f"{' '.join(parts) or '1 rank'}, ZeRO {layout['zero']}"


def _show_listing(found: dict[str, Any]) -> None:
    out = console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "size", "layout", "tokens", "loss", "validation", ""):
        table.add_column(name, justify="left" if name in ("layout", "") else "right")
    for row in found["checkpoints"]:
        losses = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("loss", "validation"))
        mark = ", ".join(["latest"] * row["latest"] + ["not whole"] * (not row["whole"]))
        tokens = "" if row["tokens"] is None else si(row["tokens"])
        table.add_row(str(row["step"]), size(row["bytes"]), _layout(row["layout"]), tokens, *losses, mark)
    out.print(table)
    for row in found["checkpoints"]:
        if not row["whole"]:
            out.print(f"Step {row['step']} is not whole: {row['fault']}. --resume leaves it out.", highlight=False, markup=False)
    if not any(row["latest"] for row in found["checkpoints"]):
        out.print("No checkpoint is named by `latest`: --resume takes the newest whole one.", highlight=False, markup=False)
    for name in found["leftovers"]:
        out.print(f"{name} was left by an interrupted save; the next save removes it.", highlight=False)


def _show_verified(found: dict[str, Any]) -> None:
    for row in found["checkpoints"]:
        console().print(f"step {row['step']}: whole, {row['files']} files, {size(row['bytes'])}", highlight=False)


def _show_converted(done: dict[str, Any]) -> None:
    out, after, ranks = console(), done["after"], done["ranks"]
    out.print(
        f"Step {done['step']} ({_layout(done['before'])}) is now {done['checkpoint']}, for any layout.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    out.print(f"{size(done['bytes'])} in {done['seconds']:.1f} s. The recipe is set to {_layout(after)}. Next:", highlight=False)
    procs = f" --procs {ranks}" if ranks > 1 else ""
    out.print(f"  attractor train {done['run']}/config.yaml{procs} --resume", soft_wrap=True, highlight=False)
