"""What `attractor data` shows of a set of puzzles: one table of its splits, one of its quantiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from launchers.output import console, size


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is words, the others numbers."""
    found = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, column in enumerate(columns):
        found.add_column(column, justify="left" if number == 0 else "right")
    return found


def show_puzzles(folder: Path, manifest: dict[str, Any]) -> None:
    """What `attractor data prepare` made."""
    _title(str(folder), manifest["game"], manifest["height"], manifest["vocabulary_size"])
    splits = table("Splits", "split", "puzzles", "stored", "least", "median", "mean", "largest")
    for name, split in manifest["splits"].items():
        rated = split["ratings"]
        middle = (f"{rated['median']:g}", f"{rated['mean']:.1f}")
        splits.add_row(name, f"{split['puzzles']:,}", size(split["bytes"]), f"{rated['least']:,}", *middle, f"{rated['largest']:,}")
    console().print(splits)
    _legend(manifest["game"], {name: split["rated_by"] for name, split in manifest["splits"].items()})
    _shared(manifest["shared"])
    _line(f"Next: attractor data stats {folder}, or a run with data.path={folder}")


def show_puzzles_verified(report: dict[str, Any]) -> None:
    """What `attractor data verify` found sound."""
    right = "has one solution, and its answer is this" if report["game"] == "sudoku" else "has a path, and its answer is a shortest one"
    _line(
        f"{report['path']} is whole: {report['shards']} shards ({size(report['bytes'])}), {report['puzzles']:,} puzzles in "
        f"{', '.join(report['splits'])}; each {right}."
    )


def show_puzzles_stats(found: dict[str, Any]) -> None:
    """What `attractor data stats` counted."""
    _title(found["path"], found["game"], found["size"], found["vocabulary_size"])
    _line(f"from {', '.join(found['sources'])}")
    counts = table("Splits", "split", "puzzles", "distinct", "shards", "stored")
    quantiles = next(iter(found["splits"].values()))["ratings"]
    ratings = table("Rating, by quantile", "split", *quantiles)
    given = table(f"{found['given'].capitalize()}, by quantile", "split", *quantiles)
    for name, split in found["splits"].items():
        counts.add_row(name, f"{split['puzzles']:,}", f"{split['distinct']:,}", str(split["shards"]), size(split["stored_bytes"]))
        ratings.add_row(name, *(f"{value:,}" for value in split["ratings"].values()))
        given.add_row(name, *(f"{value:,}" for value in split["given"].values()))
    for rows in (counts, ratings, given):
        console().print(rows)
    _legend(found["game"], {name: split["rated_by"] for name, split in found["splits"].items()})
    _shared(found["shared"])


def _title(folder: str, game: str, side: int, vocabulary: int) -> None:
    console().print(f"[bold]{escape(folder)}[/]: {game} {side} x {side}, vocabulary {vocabulary}", highlight=False, soft_wrap=True)


def _legend(game: str, rated_by: dict[str, str]) -> None:
    """What the ratings count."""
    if game == "maze":
        return _line("Ratings are steps of the shortest path.")
    by = {"solver": "guesses of our solver", "file": "as the source gives them"}
    kinds = {name: by[kind] for name, kind in rated_by.items()}
    said = set(kinds.values())
    return _line("Ratings are " + (said.pop() if len(said) == 1 else "; ".join(f"{kind} ({name})" for name, kind in kinds.items())) + ".")


def _shared(count: int) -> None:
    if count:
        what = "validation puzzles are training puzzles up to symmetry: what they measure is partly memory."
        console().print(f"{count:,} {what}", style="yellow", highlight=False, soft_wrap=True)


def _line(text: str) -> None:
    console().print(text, highlight=False, markup=False, soft_wrap=True)
