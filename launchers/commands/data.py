"""`attractor data`: text to shards, and what is in them. The work is data_pipeline's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launchers.output import console, deliver, error_console, si, size

if TYPE_CHECKING:
    from data_pipeline.prepare import Progress as Stage
    from data_pipeline.prepare import Report

app = typer.Typer(help="Turn text into shards that a run can read, and check them.", no_args_is_help=True)

_PREPARE_EPILOG = """\
[bold]Sources[/]

  a .txt, .jsonl(.gz, .zst) or .parquet file, or a folder of them

  hf:NAME, hf:NAME/CONFIG, hf:NAME@SPLIT: a data set of the Hugging Face hub, streamed

  python-docs: the English documentation inside every Python; needs no network

[bold]Examples[/]

  attractor data prepare python-docs --out data/docs --vocab-size 4096 --sequence-length 256

  attractor data prepare corpus/ extra.jsonl.zst --out data/web --tokenizer tokenizer.json --workers 8
"""

_VERIFY_EPILOG = """\
[bold]Example[/]

  attractor data verify data/docs
"""

_STATS_EPILOG = """\
[bold]Example[/]

  attractor data stats data/docs --json
"""

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `attractor data prepare` wrote.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command("prepare", epilog=_PREPARE_EPILOG)
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Where text comes from; see below.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the shards.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json to use.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="Train a byte-pair tokenizer of this size instead.", show_default="32768"),
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", metavar="S", help="Tokens a training sequence.")] = 1024,
    validation: Annotated[
        str, typer.Option("--validation", metavar="SHARE|SOURCE", help="Held-out share of the documents, or a source of its own.")
    ] = "0.01",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that tokenise.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Tokenise text and write it as shards with a manifest."""

    def compute() -> dict[str, Any]:
        from data_pipeline.prepare import prepare as run

        with preparing() as report:
            manifest = run(
                sources,
                out,
                tokenizer=tokenizer,
                vocabulary_size=vocab_size,
                sequence_length=sequence_length,
                validation=validation,
                workers=workers,
                progress=report,
            )
        return asdict(manifest)

    deliver(as_json, compute, lambda manifest: _show_manifest(out, manifest))


@app.command("verify", epilog=_VERIFY_EPILOG)
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check every shard against its hashes and the manifest; a damaged one is named."""

    def compute() -> dict[str, Any]:
        from data_pipeline.verify import verify as run

        return asdict(run(folder))

    deliver(as_json, compute, _show_verified)


@app.command("stats", epilog=_STATS_EPILOG)
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Documents, tokens, bytes and what was skipped, by split."""

    def compute() -> dict[str, Any]:
        from data_pipeline.stats import stats as run

        return asdict(run(folder))

    deliver(as_json, compute, _show_stats)


@contextmanager
def preparing() -> Iterator[Report]:
    """A bar on standard error that follows the stages of a preparation; where there is no terminal, nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=error_console(), disable=not error_console().is_terminal)
    tasks: dict[str, Any] = {}

    def report(stage: Stage) -> None:
        if stage.stage not in tasks:
            tasks[stage.stage] = bar.add_task(stage.stage, total=stage.total, counts="")
        counts = f"{si(stage.documents)} documents" + (f", {si(stage.tokens)} tokens" if stage.tokens else "")
        bar.update(tasks[stage.stage], completed=stage.done, total=stage.total, counts=counts)

    with bar:
        yield report


def _show_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    _title(str(folder), manifest)
    _splits(manifest["splits"])
    _skipped(manifest["skipped"])
    console().print(f"Next: attractor data stats {folder}, or a run with data.path={folder}", highlight=False, markup=False, soft_wrap=True)


def _show_verified(report: dict[str, Any]) -> None:
    console().print(
        f"{report['path']} is whole: {report['shards']} shards ({size(report['bytes'])}), {report['windows']:,} windows, "
        f"{report['tokens']:,} tokens in {', '.join(report['splits'])}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _show_stats(found: dict[str, Any]) -> None:
    _title(found["path"], found)
    _splits(found["splits"])
    lengths = _table("Tokens a document, by quantile", "split", *next(iter(found["splits"].values()))["lengths"])
    for name, split in found["splits"].items():
        lengths.add_row(name, *(f"{value:,}" for value in split["lengths"].values()))
    top = _table("Largest origins", "origin", "documents", "tokens", "text")
    for name, counts in found["top"].items():
        top.add_row(escape(name), f"{counts['documents']:,}", f"{counts['tokens']:,}", size(counts["bytes"]))
    console().print(lengths)
    console().print(top)
    _skipped(found["skipped"])


def _title(folder: str, found: dict[str, Any]) -> None:
    console().print(
        f"[bold]{escape(folder)}[/]: sequence length {found['sequence_length']}, vocabulary {found['vocabulary_size']}, "
        f"tokenizer {found['tokenizer_fingerprint'][:12]}",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _splits(splits: dict[str, dict[str, Any]]) -> None:
    table = _table("Splits", "split", "documents", "tokens", "windows", "text", "bytes a token")
    for name, split in splits.items():
        ids = split["tokens"] - split["documents"]  # begin tokens stand for no text
        rate = f"{split['bytes'] / ids:.2f}" if ids else ""
        table.add_row(name, f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['windows']:,}", size(split["bytes"]), rate)
    console().print(table)


def _skipped(skipped: dict[str, int]) -> None:
    for reason, count in skipped.items():
        console().print(f"skipped {count:,}: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
