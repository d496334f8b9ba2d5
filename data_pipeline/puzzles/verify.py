"""Verify a prepared set of puzzles: every byte against the manifest, and every puzzle against the rules of its game."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import Refusal
from data_pipeline.puzzles.checking import first_wrong
from data_pipeline.puzzles.manifest import PuzzleManifest, open_puzzles
from data_pipeline.puzzles.shards import Puzzles, PuzzleStore
from data_pipeline.shards import HASHES, Damaged, Shard
from data_pipeline.store import describe

NAMED = 20  # damaged shards in one message


@dataclass(frozen=True)
class PuzzleReport:
    """What was found sound."""

    path: str
    game: str
    size: int
    splits: list[str]
    shards: int
    bytes: int
    puzzles: int


def verify_puzzles(path: str | Path, progress: Callable[[float], None] | None = None) -> PuzzleReport:
    """Check indexes, of every shard presence, size, both hashes and samples, the manifest's counts, and that each puzzle has one solution
    (a maze: a path) and this is it. Returns only if all are sound: the Refusal names each damaged shard, or the first wrong puzzle.
    """
    manifest = open_puzzles(path)
    shards = size = puzzles = 0
    damaged: list[str] = []
    sound: dict[str, Puzzles] = {}
    for name, split in manifest.splits.items():
        store = PuzzleStore(path, name, None, manifest)
        found = [_loaded(store, shard) for shard in store.shards]
        wrong = [f"{name}/{shard.name} {what}" for shard, what in zip(store.shards, found, strict=True) if isinstance(what, str)]
        parts = [part for part in found if not isinstance(part, str)]
        if not wrong:
            sound[name] = Puzzles.join(parts)
            wrong = [f"{name} has {len(sound[name])} puzzles, the manifest says {split.puzzles}"] * (len(sound[name]) != split.puzzles)
        damaged += wrong
        shards, size, puzzles = shards + len(store.shards), size + sum(shard.bytes for shard in store.shards), puzzles + split.puzzles
    if damaged:
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise Refusal(f"{path} is damaged: {'; '.join(damaged[:NAMED])}{more}. Restore these files from a copy, or prepare them again.")
    _check_rules(path, manifest, sound, progress)
    return PuzzleReport(str(path), manifest.game, manifest.height, sorted(manifest.splits), shards, size, puzzles)


def _loaded(store: PuzzleStore, shard: Shard) -> Puzzles | str:
    """The shard's puzzles, or what is wrong with it."""
    try:
        return store.load(shard, tuple(HASHES))
    except (Damaged, OSError) as error:
        return describe(error)


def _check_rules(path: str | Path, manifest: PuzzleManifest, splits: dict[str, Puzzles], progress: Callable[[float], None] | None) -> None:
    for name, puzzles in splits.items():
        wrong, _ = first_wrong(manifest.board, puzzles.inputs, puzzles.answers, progress)
        if wrong:
            raise Refusal(f"{path}: puzzle {wrong[0]} of {name} is wrong though its shard is whole: {wrong[1]}. Prepare the set again.")
