"""`attractor import`: published weights, or an export of ours, as a run folder. docs/checkpoints.md says what is mapped to what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.output import console, deliver, fraction_bar, print_note

EPILOG = """\
[bold]Examples[/]

  attractor import attractor-140m --out runs/attractor-140m --tokenizer tokenizer.json

  attractor import parcae-140m --out runs/parcae-140m --data data/fineweb --json

  attractor evaluate runs/attractor-140m

  attractor train runs/attractor-140m/config.yaml data.path=data/fineweb --resume
"""


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A published model (config.json beside model.pt, pytorch_model.bin or safetensors), a training run of the public code "
            "(model_config.json and checkpoints-*), one of its checkpoint files, or what `attractor export` wrote.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder to write; it must not exist.", show_default=False)],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FILE", help="The model's tokenizer.json.", show_default="DIR's, else that of --data"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PREPARED", help="Prepared text to evaluate and train on.", show_default="none yet"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Make a run of published weights: evaluate it, export it, train on."""

    def compute() -> dict[str, Any]:
        from pretrain.hub.published import import_run

        with fraction_bar("importing") as report:
            return import_run(source, out, tokenizer=tokenizer, data=data, progress=report)

    deliver(as_json, compute, _show)


def _show(result: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{result['run']}[/] from {result['source']}", highlight=False)
    out.print(f"{result['kind']}, {result['parameters']:,} parameters from {result['tensors']} tensors", highlight=False)
    out.print(f"vocabulary {result['vocabulary_size']:,}, sequences of {result['sequence_length']:,} tokens", highlight=False)
    for note in result["notes"]:
        print_note(note)
    data = "" if result["data"] else "data.path=PREPARED "
    if result["data"]:
        out.print(f"Evaluate it: attractor evaluate {result['run']}", highlight=False)
    out.print(f"Train on:    attractor train {result['run']}/config.yaml {data}train.tokens=N --resume", highlight=False, soft_wrap=True)
