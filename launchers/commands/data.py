"""`attractor data`: text or puzzles to shards, and what is in them. The work is data_pipeline's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launchers.commands.data_puzzles import show_puzzles, show_puzzles_stats, show_puzzles_verified, table
from launchers.output import console, deliver, error_console, fraction_bar, si, size

if TYPE_CHECKING:
    from data_pipeline.prepare import Progress as Stage
    from data_pipeline.prepare import Report

app = typer.Typer(help="Turn text or puzzles into shards that a run can read, and check them.", no_args_is_help=True)

_PREPARE_EPILOG = """\
[bold]Sources[/]

  a .txt, .jsonl(.gz, .zst) or .parquet file, or a folder of them

  hf:NAME, hf:NAME/CONFIG, hf:NAME@SPLIT: a data set of the Hugging Face hub, streamed

  python-docs: the English documentation inside every Python; needs no network

  sudoku, maze: puzzles, generated (--size, --puzzles, --min-rating, --seed)

  sudoku:PATH, maze:PATH: puzzles of a .csv(.gz) file, or of a folder as HRM and TRM write it

[bold]Examples[/]

  attractor data prepare python-docs --out data/docs --vocab-size 4096 --sequence-length 256

  attractor data prepare corpus/ extra.jsonl.zst --out data/web --tokenizer tokenizer.json --workers 8

  attractor data prepare sudoku --size 6 --puzzles 1000 --validation 500 --out data/sudoku6

  attractor data prepare sudoku:sudoku-extreme/ --puzzles 1000 --out data/sudoku-extreme-1k
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
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Where text or puzzles come from; see below.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the shards.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json to use.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="Train a byte-pair tokenizer of this size instead.", show_default="32768"),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", metavar="S", help="Tokens a training sequence.", show_default="1024")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            metavar="SHARE|N|SOURCE",
            help="Held-out share of the documents or puzzles, number of puzzles, or a source of its own.",
            show_default="0.01; of puzzles the source's test split, else 0.1",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes that tokenise.", show_default="1")] = None,
    puzzles: Annotated[
        int | None,
        typer.Option(
            "--puzzles", metavar="N", help="Training puzzles to generate, or to draw from PATH.", show_default="1000; all of PATH"
        ),
    ] = None,
    side: Annotated[
        int | None, typer.Option("--size", metavar="S", help="Side of generated puzzles.", show_default="sudoku 9; maze 30")
    ] = None,
    min_rating: Annotated[
        int | None,
        typer.Option(
            "--min-rating",
            metavar="R",
            help="Generate puzzles this hard: guesses of a Sudoku, steps of a maze's path.",
            show_default="0; maze 109 at size 30, else twice the size",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of generated puzzles, and of what is held out.", show_default="0")] = None,
    as_json: AsJson = False,
) -> None:
    """Write text, tokenised, or puzzles as shards with a manifest."""
    of_text = {"--tokenizer": tokenizer, "--vocab-size": vocab_size, "--sequence-length": sequence_length, "--workers": workers}
    of_puzzles = {"--puzzles": puzzles, "--size": side, "--min-rating": min_rating, "--seed": seed}

    def compute_text() -> dict[str, Any]:
        from data_pipeline.prepare import prepare as run

        with preparing() as report:
            manifest = run(
                sources,
                out,
                tokenizer=tokenizer,
                vocabulary_size=vocab_size,
                sequence_length=sequence_length or 1024,
                validation="0.01" if validation is None else validation,
                workers=workers or 1,
                progress=report,
            )
        return asdict(manifest)

    def compute_puzzles() -> dict[str, Any]:
        from data_pipeline.puzzles.prepare import prepare_puzzles as run

        with fraction_bar("prepare") as report:
            found = run(
                sources[0], out, size=side, puzzles=puzzles, seed=seed or 0, validation=validation, least=min_rating, progress=report
            )
        return asdict(found)

    if _are_puzzles(sources, of_text, of_puzzles):
        deliver(as_json, compute_puzzles, lambda manifest: show_puzzles(out, manifest))
    else:
        deliver(as_json, compute_text, lambda manifest: _show_manifest(out, manifest))


def _are_puzzles(sources: list[str], of_text: dict[str, Any], of_puzzles: dict[str, Any]) -> bool:
    """Whether the sources are puzzles; refuses a mixture, and options of the other kind."""
    from data_pipeline.errors import Refusal
    from data_pipeline.puzzles.games import GAMES
    from data_pipeline.puzzles.prepare import is_puzzles

    named = [source for source in sources if is_puzzles(source)]
    if named and len(sources) > 1:
        raise Refusal(f"{named[0]} is a set of its own and cannot be mixed with other sources. Prepare each by itself.")
    foreign = [option for option, value in (of_text if named else of_puzzles).items() if value is not None]
    if foreign:
        kind = "text" if named else "puzzles"
        remedy = "Leave it out." if named else f"Leave it out, or give one of the sources {', '.join(GAMES)} (or GAME:PATH)."
        raise Refusal(f"{foreign[0]} is an option for {kind}, and {sources[0]} is not a source of {kind}. {remedy}")
    _check_spelling([source for source in sources if source not in named])
    return bool(named)


def _check_spelling(sources: list[str]) -> None:
    from data_pipeline.errors import Refusal
    from data_pipeline.puzzles.games import GAMES

    for source in sources:
        near = get_close_matches(source.partition(":")[0], GAMES, n=1)
        if near and not Path(source).exists():
            raise Refusal(f"There is no source {source}. Did you mean {near[0]}? `attractor data prepare --help` lists the sources.")


@app.command("verify", epilog=_VERIFY_EPILOG)
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check every shard against its hashes and the manifest, and every puzzle; a damaged one is named."""

    def compute() -> dict[str, Any]:
        from data_pipeline.verify import verify as run

        with fraction_bar("verify") as report:
            return asdict(run(folder, report))

    deliver(as_json, compute, lambda report: show_puzzles_verified(report) if "game" in report else _show_verified(report))


@app.command("stats", epilog=_STATS_EPILOG)
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Documents, tokens, bytes and what was skipped, by split; of puzzles, how hard they are."""

    def compute() -> dict[str, Any]:
        from data_pipeline.stats import stats as run

        return asdict(run(folder))

    deliver(as_json, compute, lambda found: show_puzzles_stats(found) if "game" in found else _show_stats(found))


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
    lengths = table("Tokens a document, by quantile", "split", *next(iter(found["splits"].values()))["lengths"])
    for name, split in found["splits"].items():
        lengths.add_row(name, *(f"{value:,}" for value in split["lengths"].values()))
    top = table("Largest origins", "origin", "documents", "tokens", "text")
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


def _splits(splits: dict[str, dict[str, Any]]) -> None:
    rows = table("Splits", "split", "documents", "tokens", "windows", "text", "bytes a token")
    for name, split in splits.items():
        ids = split["tokens"] - split["documents"]  # begin tokens stand for no text
        rate = f"{split['bytes'] / ids:.2f}" if ids else ""
        rows.add_row(name, f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['windows']:,}", size(split["bytes"]), rate)
    console().print(rows)


def _skipped(skipped: dict[str, int]) -> None:
    for reason, count in skipped.items():
        console().print(f"skipped {count:,}: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
