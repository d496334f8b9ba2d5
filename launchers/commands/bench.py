"""`attractor bench`: how fast and how large, measured here and now. Timings live in these commands, never in tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launchers.commands import bench_reasoning
from launchers.commands.train import Overrides
from launchers.output import console, deliver, si, size
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.layout import Layout

app = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)
app.command("reasoning", epilog=bench_reasoning.EPILOG)(bench_reasoning.command)

_STEP_EPILOG = """\
[bold]Examples[/]

  attractor bench step --iterations 1,8,64,auto

  attractor bench step attractor-140m train.micro_batch=8 train.compile=true --json
"""

_MODELS_EPILOG = """\
[bold]Examples[/]

  attractor bench models

  attractor bench models attractor-140m train.micro_batch=4 train.compile=true --json
"""

_DATA_EPILOG = """\
[bold]Examples[/]

  attractor bench data

  attractor bench data corpus.txt --workers 2 --json
"""

_LAYOUT_EPILOG = """\
[bold]Examples[/]

  attractor bench layout --procs 2

  attractor bench layout attractor-140m train.global_batch=32 train.micro_batch=2 --procs 8 --json
"""

_GENERATE_EPILOG = """\
[bold]Examples[/]

  attractor bench generate

  attractor bench generate edu-5m --tokens 512 --json
"""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Row = dict[str, Any]


def parse_counts(text: str) -> list[int | str]:
    """`1,8,auto` -> [1, 8, "auto"]. Raises Refusal for anything but whole numbers above 0 and auto."""
    words = [word.strip() for word in text.split(",")]
    if not all(word == "auto" or (word.isdecimal() and int(word) > 0) for word in words):
        raise Refusal(f"--iterations {text} is no list of solver iterations: write whole numbers above 0, or auto, such as 1,8,64,auto.")
    return [word if word == "auto" else int(word) for word in words]


@app.command("step", epilog=_STEP_EPILOG)
def step(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The model and batch to time.")] = "demo",
    overrides: Overrides = None,
    iterations: Annotated[
        str, typer.Option("--iterations", metavar="1,8,64,auto", help="Solver iterations to time; auto solves to the tolerance.")
    ] = "1,8,64,auto",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps a row, after a warm-up.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Time a training step by part, at fixed numbers of solver iterations and (auto) as the recipe solves."""
    resolved = load_recipe(recipe, overrides or [])
    counts = parse_counts(iterations)

    def compute() -> list[Row]:
        from pretrain.bench import bench_step

        try:
            return bench_step(resolved, counts, steps)
        except BrokenProcessPool as error:
            raise Refusal(
                f"The process that timed {resolved.run.name!r} was ended from outside, most likely because memory ran out: `attractor "
                f"plan` shows what a step needs. Lower train.micro_batch (now {resolved.train.micro_batch}), or set train.recompute=true."
            ) from error

    deliver(as_json, compute, lambda rows: _show("Training step", rows))


@app.command("models", epilog=_MODELS_EPILOG)
def models(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Width, blocks and batch that every kind is given.")] = "demo",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps a kind, after a warm-up.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Put all kinds of model side by side, as wide and with as many blocks: step time, tokens/s, FLOP/s reached, memory."""
    resolved = load_recipe(recipe, overrides or [])

    def compute() -> list[Row]:
        from pretrain.bench import bench_models

        return bench_models(resolved, steps)

    deliver(as_json, compute, _show_models)


def _show_models(rows: list[Row]) -> None:
    table = Table(title="Training step by kind of model", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("kind", "f", "grad.", "step", "tokens/s", "FLOP/s", "peak", "saved"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["kind"],
            f"{row['evaluations']:.1f}",
            f"{row['applications']:.1f}",
            f"{row['step_seconds']:.3f} s",
            si(row["tokens_per_second"]),
            si(row["model_flops_per_second"]),
            size(row["memory_bytes"]),
            size(row["saved_bytes"]),
        )
    console().print(table)
    console().print("f, grad.: the map or the looped blocks, how often without and with gradients", style="dim")
    console().print("peak: of the process or the GPU's allocator. saved: what autograd keeps for backward", style="dim")


@app.command("data", epilog=_DATA_EPILOG)
def data(
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help="Text to measure on.", show_default="python-docs")] = None,
    megabytes: Annotated[float, typer.Option("--megabytes", min=0.1, help="Text to tokenise, at most.")] = 10.0,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Of the tokenizer that is trained for it.")] = 4096,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens a sequence that is loaded.")] = 256,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Cores that tokenise; loading takes one.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure tokenising (MB/s, against tokenizers' own encode_batch) and loading (tokens/s on one core)."""
    names = sources or ["python-docs"]
    deliver(as_json, lambda: _data_rows(names, megabytes, vocab_size, sequence_length, workers), lambda rows: _show("Data", rows))


@app.command("layout", epilog=_LAYOUT_EPILOG)
def layout(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The model and batch to time.")] = "demo",
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option("--procs", min=2, help="Ranks on this machine to lay out.")] = 2,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps a layout, after a warm-up.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Time a training step on one rank and on every legal layout of --procs ranks, and what they spend on communication."""
    changes = ["train.global_batch=8", "train.micro_batch=1", *(overrides or [])] if recipe == "demo" else list(overrides or [])
    resolved = load_recipe(recipe, changes)
    deliver(as_json, lambda: _layout_rows(resolved, recipe, changes, procs, steps), _show_layouts)


def _show_layouts(rows: list[Row]) -> None:
    table = Table(title="Training step by layout", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("layout", "step", "tokens/s", "solve", "comm.", "solver's", "sent"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in rows:
        shares = [f"{100 * row[share]:.0f}%" for share in ("solve_share", "communication_share", "solver_share_of_communication")]
        table.add_row(row["layout"], f"{row['step_seconds']:.3f} s", si(row["tokens_per_second"]), *shares, size(row["sent_bytes"]))
    console().print(table)
    console().print("solve, comm.: shares of a step (waiting for other ranks is communication too)", style="dim")
    console().print("solver's: its share of the communication. sent: by a rank, a step", style="dim")


def _layout_rows(resolved: Recipe, recipe: str, changes: list[str], procs: int, steps: int) -> list[Row]:
    from launchers.local import launch
    from pretrain.bench_layout import complete, layouts_of

    rows = []
    layouts = [Layout(), *layouts_of(complete(resolved), procs)]
    with tempfile.TemporaryDirectory() as folder, console().status("") as status:
        for number, each in enumerate(layouts):
            status.update(f"{each.describe()} ({number + 1} of {len(layouts)})")
            result = Path(folder) / f"{number}.json"
            axes = [f"layout.tensor={each.tensor}", f"layout.pipeline={each.pipeline}", "layout.zero=1"]
            code = launch(["-m", "pretrain.bench_layout", str(result), str(steps), recipe, *changes, *axes], each.ranks)
            if code:
                raise typer.Exit(code)
            rows.append(json.loads(result.read_text()))
    return rows


def _data_rows(sources: list[str], megabytes: float, vocab_size: int, sequence_length: int, workers: int) -> list[Row]:
    from data_pipeline import prepare
    from data_pipeline.bench import bench_loading, bench_tokenising
    from data_pipeline.manifest import TOKENIZER

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        manifest = prepare(sources, prepared, vocabulary_size=vocab_size, sequence_length=sequence_length, workers=workers)
        texts = list(_texts(sources, int(megabytes * 1e6)))
        tokenising = bench_tokenising(texts, (prepared / TOKENIZER).read_text(encoding="utf-8"), workers)
        loading = bench_loading(prepared)
    text, shards = f"{tokenising.megabytes:.2f} MB of text", f"{manifest.splits['train'].tokens} tokens in shards"
    return [
        {"measure": "tokenising", "cores": workers, "unit": "MB/s", "rate": tokenising.ours, "on": text},
        {"measure": "encode_batch", "cores": workers, "unit": "MB/s", "rate": tokenising.encode_batch, "on": text},
        {"measure": "loading", "cores": 1, "unit": "tokens/s", "rate": loading, "on": shards},
    ]


def _texts(sources: list[str], limit: int) -> Iterator[str]:
    """Documents of the sources, up to `limit` bytes."""
    from data_pipeline.sources import open_sources

    corpus = open_sources(sources)
    for document in corpus.documents(corpus.reading()):
        limit -= len(document.text.encode())
        if limit < 0:
            return
        yield document.text


def _show(title: str, rows: list[Row]) -> None:
    """A column for each row of the result, headed by its first value; the names say the unit (seconds, bytes, per second)."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    first, *names = rows[0]
    table.add_column(first)
    for row in rows:
        table.add_column(str(row[first]), justify="right")
    for name in names:
        if all(row.get(name) is None for row in rows):  # such as mfu, where the peak is not known
            continue
        table.add_row(name.replace("_", " "), *(_cell(name, row.get(name)) for row in rows))
    console().print(table)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("seconds"):
        return f"{value:.4f}"
    return si(value) if abs(value) >= 1000 else f"{value:.3g}"


_CHECKPOINT_EPILOG = """\
[bold]Examples[/]

  attractor bench checkpoint attractor-140m

  attractor bench checkpoint transformer-1.3b --ranks 4 --dir /scratch --json
"""


@app.command("checkpoint", epilog=_CHECKPOINT_EPILOG)
def checkpoint(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Whose size and optimizer the checkpoint has.")] = "attractor-1.3b",
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Data ranks that it is of.")] = 4,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where to write it: it takes 10 times the weights' fp32 bytes.", show_default="the temporary folder"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the change of a checkpoint's layout, and its export, beside plain copies of the same bytes; and their memory."""
    resolved = load_recipe(recipe, overrides or [])

    def compute() -> list[Row]:
        from pretrain.bench_checkpoint import bench_checkpoint

        return bench_checkpoint(resolved, ranks, folder)

    deliver(as_json, compute, lambda rows: _show("Checkpoint", rows))


@app.command("generate", epilog=_GENERATE_EPILOG)
def generate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The model to time.")] = "demo",
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="New tokens a case.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Time generation with a cache and without, at no iterations and to the tolerance, beside a Transformer of the backbone's size."""
    resolved = load_recipe(recipe, overrides or [])

    def compute() -> list[Row]:
        from pretrain.bench_generate import bench_generate

        return bench_generate(resolved, tokens)

    deliver(as_json, compute, _show_generation)


def _show_generation(rows: list[Row]) -> None:
    table = Table(title=f"Generation of {rows[0]['tokens']} tokens", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("model, depth", "iterations", "tokens/s", "beside", "uncached", "gain", "same"):
        table.add_column(name, justify="left" if name == "model, depth" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['iterations_per_token']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            "" if row["over_transformer"] is None else f"{100 * row['over_transformer']:.1f}%",
            f"{row['uncached_tokens_per_second']:.1f}",
            f"{row['cached_over_uncached']:.1f}x",
            f"{100 * row['agreed']:.0f}%",
        )
    console().print(table)
    console().print("beside: speed in turns with the transformer. uncached: all tokens again for each", style="dim")
    console().print("gain: cached over uncached. same: share of tokens that both choose", style="dim")
