"""Prepare puzzles: generated or read, checked, split without a leak, and written as a set that PuzzleStream and PuzzleSet read.

Nothing is written before every puzzle is known to be sound, and the folder appears under its name only when it is complete.

Splits. Puzzles that are one up to symmetry share a key (classes.py), and a hash of the key and the seed orders the classes. Where one
source is split, or puzzles are generated, the first classes are held out, so no validation puzzle is a training puzzle transformed. Where
validation has a source of its own both are taken as they are, and the manifest counts what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.manifest import MANIFEST, TRAIN, VALIDATION
from data_pipeline.puzzles.checking import first_wrong
from data_pipeline.puzzles.classes import class_keys
from data_pipeline.puzzles.draws import draws, mix
from data_pipeline.puzzles.games import DEFAULT_SIZE, GAMES, SUDOKU, Board, board_of
from data_pipeline.puzzles.manifest import PuzzleManifest
from data_pipeline.puzzles.readers import FORMS, read_puzzles
from data_pipeline.puzzles.sampling import batches, default_least
from data_pipeline.puzzles.shards import Puzzles, write_split
from data_pipeline.unfinished import unfinished

PUZZLES = 1000  # generated, unless told
SHARE = 0.1  # held out, unless told
BARREN = 200  # batches in which nothing was found: there is no more

_SUBSET, _CLASSES = 5, 6  # purposes of random numbers

Progress = Callable[[float], None]


def is_puzzles(source: str) -> bool:
    """Whether a source names puzzles: a game, or GAME:PATH."""
    return source.partition(":")[0] in GAMES


def prepare_puzzles(
    source: str,
    out: str | Path,
    *,
    size: int | None = None,
    puzzles: int | None = None,
    seed: int = 0,
    validation: str | None = None,
    least: int | None = None,
    progress: Progress | None = None,
) -> PuzzleManifest:
    """Make the new folder `out` from `source`: `sudoku` or `maze` generates, `sudoku:PATH` or `maze:PATH` reads.

    size        side of the grid of generated puzzles (default 9; 30)
    puzzles     how many training puzzles: to generate (default 1,000), or to draw from the source (default all)
    seed        decides what is generated, drawn and held out
    validation  a share (below 1), a number of puzzles, or a source; default: the source's own test split, else a tenth
    least       generate puzzles rated this or more (Sudoku: guesses, default 0; maze: steps, default 109 at side 30, else twice the side)

    Refuses an `out` that exists, sources that are missing, and any puzzle that is not what it claims.
    """
    out, report = Path(out), progress or (lambda _: None)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refusal(f"{out} exists already and is not overwritten. Give --out another folder, or delete this one first.")
    game, reads, _ = source.partition(":")
    _check(source, size, puzzles, seed, least)
    held = _held(validation)
    if reads:
        train, own = _read(source, TRAIN, report), None
        if isinstance(held, str) or validation is None:
            own = _read(held, VALIDATION, report) if isinstance(held, str) else _own_test(source, report)
        splits = _divided(train, own, puzzles, seed, SHARE if isinstance(held, str) else held)
    else:
        board = board_of(game, DEFAULT_SIZE[game] if size is None else size)
        least = default_least(board) if least is None else least
        own = _read(held, VALIDATION, report) if isinstance(held, str) else None
        splits = _generated(board, puzzles or PUZZLES, seed, least, own, 0 if isinstance(held, str) else held, report)
    return _write(out, splits, [source] + ([held] if isinstance(held, str) else []), {"seed": seed, "least": least})


@dataclass(frozen=True)
class Split:
    """Puzzles of one split, all of one board; `rated_by` is "file" or "solver"; `source` names them in a message."""

    board: Board
    puzzles: Puzzles
    rated_by: str
    source: str

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Of the classes that the puzzles belong to."""
        return class_keys(self.board, self.puzzles.inputs, self.puzzles.answers)

    def take(self, rows: NDArray) -> Split:
        """The split of the puzzles at `rows` alone."""
        return Split(self.board, self.puzzles.take(rows), self.rated_by, self.source)


def _check(source: str, size: int | None, puzzles: int | None, seed: int, least: int | None) -> None:
    if puzzles is not None and puzzles < 1:
        raise Refusal(f"--puzzles {puzzles} is no number of puzzles. Give 1 or more.")
    if seed < 0:
        raise Refusal(f"--seed {seed} is not a seed. Give a whole number from 0.")
    for option, value in (("--size", size), ("--min-rating", least)):
        if value is not None and ":" in source:
            raise Refusal(f"{option} says what to generate, and {source} is read as it is. Leave it out.")
    if least is not None and least < 0:
        raise Refusal(f"--min-rating {least} is below 0, which every rating is not. Give 0 or more.")


def _held(value: str | None) -> float | int | str:
    """A share, a number of puzzles, or a source."""
    if value is None:
        return SHARE
    try:
        number = float(value)
    except ValueError:
        if not is_puzzles(value) or ":" not in value:
            raise Refusal(
                f"--validation {value} is neither a share below 1, nor a number of puzzles, nor a source: a source is sudoku:PATH or "
                f"maze:PATH, and PATH is {FORMS}."
            ) from None
        return value
    if 0 <= number < 1:
        return number
    if number >= 1 and number.is_integer():  # of inf it is not
        return int(number)
    raise Refusal(f"--validation {value} is neither a share below 1 nor a whole number of puzzles. Give one of these, or a source.")


def _own_test(source: str, report: Progress) -> Split | None:
    game, _, path = source.partition(":")
    return None if read_puzzles(game, Path(path), VALIDATION) is None else _read(source, VALIDATION, report)


def _read(source: str, split: str, report: Progress) -> Split:
    """The puzzles of GAME:PATH, each known to be sound. For validation a folder's test split, or whatever the source has."""
    game, _, path = source.partition(":")
    rows = read_puzzles(game, Path(path), split) or read_puzzles(game, Path(path), TRAIN)
    if rows is None:
        raise Refusal(f"The folder {path} has no puzzles to train on. Puzzles are read from {FORMS}.")
    wrong, ratings = first_wrong(rows.board, rows.inputs, rows.answers, report)
    if wrong:
        row, what = wrong
        raise Refusal(f"{rows.name(row)}: {what}. Mend the row, or leave it out.")
    rated = ratings if rows.ratings is None or game != SUDOKU else rows.ratings
    puzzles = Puzzles(rows.inputs, rows.answers, np.zeros(len(ratings), np.int64), rated)
    return Split(rows.board, puzzles, "solver" if rated is ratings else "file", rows.where)


def _same_board(board: Board, source: str, other: Split) -> None:
    if other.board != board:
        raise Refusal(
            f"Training puzzles ({source}) are {board.game}s of side {board.size}, those for validation ({other.source}) "
            f"{other.board.game}s of side {other.board.size}. Both have to be of one game and size."
        )


def _divided(train: Split, own: Split | None, puzzles: int | None, seed: int, held: float | int) -> dict[str, Split]:
    """The splits of what was read; without a validation source of its own, whole classes are held out."""
    splits = {}
    if own is not None:
        _same_board(train.board, train.source, own)
        splits[VALIDATION] = own
    elif held:
        hashes = _hashes(train.keys, seed)
        wanted = held if isinstance(held, int) else max(1, round(held * len(hashes)))
        if wanted >= len(hashes):
            raise Refusal(f"--validation {held} would hold out all {len(hashes)} puzzles of {train.source}. Give it a smaller number.")
        last = np.sort(hashes)[wanted - 1]
        splits[VALIDATION], train = train.take(hashes <= last), train.take(hashes > last)
    if not len(train.puzzles):
        raise Refusal(f"All puzzles of {train.source} are one up to symmetry: none can be held out. Give --validation 0, or a source.")
    if puzzles is not None:
        if puzzles > len(train.puzzles):
            raise Refusal(f"--puzzles {puzzles} is more than the {len(train.puzzles)} that {train.source} has for training. Ask for fewer.")
        chosen = draws(1, _SUBSET, seed, np.arange(len(train.puzzles)))[:, 0].argsort(kind="stable")[:puzzles]
        train = train.take(np.sort(chosen))
    return {TRAIN: train, **splits}


def _generated(board: Board, count: int, seed: int, least: int, own: Split | None, held: float | int, report: Progress) -> dict[str, Split]:
    """Distinct puzzles; beside `count` for training, `held` (a number, or a share of `count`) for validation, of other classes."""
    if own is not None:
        _same_board(board, "generated", own)
    missing = {TRAIN: count, VALIDATION: held if isinstance(held, int) else round(held * count)}
    missing = {name: number for name, number in missing.items() if number}
    wanted = sum(missing.values())
    border = missing.get(VALIDATION, 0) / wanted * 2.0**64  # classes whose hash is below it are held out
    kept: dict[str, list[Puzzles]] = {name: [] for name in missing}
    seen: set[bytes] = set()
    taboo, barren = np.empty(0, np.uint64) if own is None else own.keys, 0
    for batch in batches(board, seed, least):
        keys = class_keys(board, batch.inputs, batch.answers)
        new = ~np.isin(keys, taboo) & np.array([_unseen(row.tobytes(), seen) for row in batch.inputs], np.bool_)
        aside = _hashes(keys, seed) < border
        barren += 1
        for name in missing:
            rows = np.flatnonzero(new & (aside == (name == VALIDATION)))[: missing[name]]
            kept[name].append(batch.take(rows))
            missing[name] -= len(rows)
            barren = 0 if len(rows) else barren
        report(1 - sum(missing.values()) / wanted)
        if not any(missing.values()):
            break
        if barren == BARREN:
            raise _exhausted(board, least, kept)
    splits = {name: Split(board, Puzzles.join(parts), "solver", "generated") for name, parts in kept.items()}
    return splits if own is None else {**splits, VALIDATION: own}


def _unseen(puzzle: bytes, seen: set[bytes]) -> bool:
    """Whether it is new; then it is no more."""
    before = len(seen)
    seen.add(puzzle)
    return len(seen) > before


def _hashes(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    return mix(keys ^ draws(1, _CLASSES, seed)[0])


def _exhausted(board: Board, least: int, kept: dict[str, list[Puzzles]]) -> Refusal:
    found = " and ".join(f"{sum(map(len, parts)):,} for {name}" for name, parts in kept.items())
    return Refusal(
        f"No more {board.game}s of side {board.size} rated {least} or more turn up: {found} were found, and the last {BARREN} batches had "
        "none that is new. Ask for fewer (--puzzles, --validation), or for easier ones (--min-rating)."
    )


def _write(out: Path, splits: dict[str, Split], sources: list[str], options: dict[str, int | None]) -> PuzzleManifest:
    board = splits[TRAIN].board
    shared = int(np.isin(splits[VALIDATION].keys, splits[TRAIN].keys).sum()) if VALIDATION in splits else 0
    with unfinished(out) as folder:
        manifest = PuzzleManifest(
            game=board.game,
            height=board.size,
            width=board.size,
            box=board.box,
            vocabulary_size=board.vocabulary_size,
            identifiers=1,
            sources=sources,
            splits={name: write_split(folder / name, split.puzzles, split.rated_by) for name, split in splits.items()},
            options=options,
            shared=shared,
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
