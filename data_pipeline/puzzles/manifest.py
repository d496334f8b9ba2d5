"""What a prepared folder of puzzles says about itself.

    DIR/manifest.json    this file, written last; it holds the hash of each index.json, which holds those of the shards
        train/           index.json and shard.*.mds.zstd
        validation/      likewise, where there is one

It has `format` "puzzles-1", so that a set of puzzles and a set of text are never taken for each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import Refusal
from data_pipeline.location import Location
from data_pipeline.manifest import MANIFEST
from data_pipeline.puzzles.games import Board

FORMAT = "puzzles-1"


@dataclass(frozen=True)
class PuzzleSplit:
    """One split. `bytes`: of its shards as stored; `ratings`: least, median, mean and largest difficulty; `rated_by`: "solver" (ours)
    or "file" (whatever the source's ratings count).
    """

    puzzles: int
    bytes: int
    ratings: dict[str, float]
    rated_by: str
    index_sha256: str


@dataclass(frozen=True)
class PuzzleManifest:
    """`box` is (height, width) of a Sudoku's box, None for a maze. `identifiers`: how many puzzle embeddings the set needs. `shared` counts
    the validation puzzles that a symmetry makes one of the training puzzles.
    """

    game: str
    height: int
    width: int
    box: tuple[int, int] | None
    vocabulary_size: int
    identifiers: int
    sources: list[str]
    splits: dict[str, PuzzleSplit]
    options: dict[str, Any] = field(default_factory=dict)
    shared: int = 0
    format: str = FORMAT

    @property
    def cells(self) -> int:
        """Tokens of a puzzle."""
        return self.height * self.width

    @property
    def board(self) -> Board:
        """The shape, as the functions of this package take it."""
        return Board(self.game, self.height, self.box)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> PuzzleManifest:
        """Read manifest.json; `where` names it in the Refusal of anything that is not one of ours."""
        try:
            return cls._from_object(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(
                f"{where} is not a manifest of puzzles that this version can read ({type(error).__name__}: {error}). It is damaged, or "
                "belongs to a set of text or of another version: prepare puzzles with `attractor data prepare sudoku --out DIR`."
            ) from error

    @classmethod
    def _from_object(cls, found: Mapping[str, Any]) -> PuzzleManifest:
        if found["format"] != FORMAT:
            raise ValueError(f"format is {found['format']!r}, not {FORMAT!r}")
        parts = dict(found)
        parts["box"] = tuple(found["box"]) if found["box"] else None
        parts["splits"] = {name: PuzzleSplit(**split) for name, split in found["splits"].items()}
        return cls(**parts)

    def split(self, name: str, where: str) -> PuzzleSplit:
        """The split called `name`, or a Refusal that lists those there are."""
        if name not in self.splits:
            raise Refusal(
                f"{where} has no split {name!r}, only {', '.join(sorted(self.splits))}. Prepare it again with --validation set to a number "
                "of puzzles or to a source of its own."
            )
        return self.splits[name]


def open_puzzles(path_or_url: str | Path, cache: str | Path | None = None) -> PuzzleManifest:
    """The manifest of a prepared set of puzzles, local or remote (then `cache` is the local folder that mirrors it)."""
    location = Location.of(path_or_url, cache)
    try:
        text = location.fetch(MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refusal(
            f"{location} is not a finished set of puzzles: it has no {MANIFEST}. Make one with `attractor data prepare sudoku --out DIR` "
            "(or maze), or correct data.path."
        ) from error
    return PuzzleManifest.from_json(text, f"{location}/{MANIFEST}")


def holds_puzzles(path: str | Path) -> bool:
    """Whether the local folder `path` is a set of puzzles by its manifest; False for whatever cannot be read."""
    try:
        found = json.loads(Location.of(path).fetch(MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith("puzzles-")
