"""What a run on puzzles reads: the recipe completed by its prepared puzzles, the endless row to train on, the validation set."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.puzzles import PuzzleSet, PuzzleStream, open_puzzles
from pretrain.mesh import Mesh
from pretrain.reasoning.config import PuzzleRecipe


def resolve(recipe: PuzzleRecipe) -> PuzzleRecipe:
    """The recipe with what only the prepared puzzles know: cells and vocabulary. Raises Refusal where they disagree."""
    path = recipe.sources[0][0]
    manifest = open_puzzles(path, recipe.data.cache)
    return recipe.completed(manifest.vocabulary_size, manifest.cells, manifest.identifiers, path)


class PuzzleData(NamedTuple):
    """The same on every rank: which puzzles a rank takes is arithmetic on positions (pretrain/reasoning/running.py)."""

    training: PuzzleStream
    validation: PuzzleSet


def open_data(recipe: PuzzleRecipe, _: Mesh) -> PuzzleData:
    """Raises Refusal for puzzles that are damaged, or without a validation split."""
    path, cache = recipe.sources[0][0], recipe.data.cache
    stream = PuzzleStream(path, seed=recipe.train.seed, augment=recipe.data.augment, cache=cache)
    return PuzzleData(stream, PuzzleSet(path, cache=cache))
