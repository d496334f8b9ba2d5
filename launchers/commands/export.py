"""`attractor export`: a run as a folder that transformers loads without this code. docs/checkpoints.md shows a session."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.output import console, deliver, fraction_bar, si, size
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor export runs/demo --out exports/demo

  attractor export runs/demo --out exports/demo-4 --solver-iterations 4

  attractor export runs/demo --out exports/demo-backbone --solver-iterations 0 --plain
"""


def parse_depth(text: str) -> int | str:
    """`auto` or a number. Raises Refusal for anything else."""
    if text == "auto":
        return text
    if text.isdecimal():
        return int(text)
    raise Refusal(f"--solver-iterations {text} is neither auto nor a number of iterations from 0.")


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder; it must not exist.", show_default=False)],
    solver_iterations: Annotated[
        str,
        typer.Option("--solver-iterations", metavar="auto|N", help="How far the exported model solves unless told otherwise."),
    ] = "auto",
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Code-free: a stock architecture of transformers, where one fits exactly; refused otherwise."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Export a run's newest checkpoint for Hugging Face transformers, once its logits are proved to be the training model's."""
    depth = parse_depth(solver_iterations)

    def compute() -> dict[str, Any]:
        from pretrain.hub.export import export_run

        with fraction_bar("exporting") as report:
            return export_run(run, out, solver_iterations=depth, plain=plain, progress=report)

    deliver(as_json, compute, _show)


def _show(result: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{result['out']}[/]: {result['kind']}, step {result['step']:,} of {result['run']}", highlight=False)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    compared = ", ".join(f"{difference:.1e} at {depth}" for depth, difference in result["logit_difference"].items()) + " iterations"
    if result["kind"] == "transformer":
        compared = f"{result['logit_difference']['0']:.1e}"
    table.add_row("class", result["class"] + (" (code-free)" if result["code_free"] else ""))
    table.add_row("weights", f"{result['weights']}: {si(result['parameters'])} parameters, {size(result['bytes'])}")
    if result["kind"] != "transformer":
        table.add_row("solver iterations", str(result["solver_iterations"]))
    table.add_row("logits differ by", compared)
    table.add_row("took", f"{result['seconds']:.1f} s, peak memory {size(result['peak_memory_bytes'])}")
    out.print(table)
    remote = "" if result["code_free"] else ", trust_remote_code=True"
    out.print(f'Load it: AutoModelForCausalLM.from_pretrained("{result["out"]}"{remote})', highlight=False, soft_wrap=True)
    if not result["code_free"]:
        out.print(f'Use it here: attractor generate {result["out"]} --prompt "..."', highlight=False, soft_wrap=True)
