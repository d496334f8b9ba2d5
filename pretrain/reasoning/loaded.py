"""A reasoner to use, from a run on puzzles: the weights of its newest whole checkpoint, the average where one is kept. No engine.

Beside pretrain/loaded.py, which has what both regimes share. Also the puzzles to use it on: the run's own set, or another of the same game
and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.manifest import VALIDATION
from data_pipeline.puzzles import PuzzleSet
from model.reasoning.cost import count_reasoner
from model.reasoning.reasoner import Reasoner, build
from pretrain.errors import Refusal
from pretrain.loaded import any_recipe_of, newest_weights, read_weights
from pretrain.reasoning.config import PuzzleRecipe


@dataclass(frozen=True, kw_only=True)
class LoadedPuzzleRun:
    """A reasoner in eval mode, in the precision it trained in, at the checkpoint of `step`."""

    path: Path
    model: Reasoner
    device: torch.device
    which: str
    """The file the weights came from."""
    step: int
    recipe: PuzzleRecipe


def puzzle_recipe_of(run: Path) -> PuzzleRecipe:
    """The resolved recipe of a run on puzzles. Raises Refusal for a folder that holds no such run."""
    recipe = any_recipe_of(run)
    if not isinstance(recipe, PuzzleRecipe):
        raise Refusal(f"{run} is the run of a language model, and this is for puzzles. Give the folder of a run with regime: reasoning.")
    return recipe


def load_puzzle_run(run: Path, *, device: torch.device | None = None) -> LoadedPuzzleRun:
    """The reasoner of a run's newest whole checkpoint. Raises Refusal."""
    recipe = puzzle_recipe_of(run)
    found = newest_weights(run, recipe, device)
    config = recipe.architecture
    numbers = count_reasoner(config).total
    model = read_weights(lambda: build(config, device="meta"), numbers, found.folder, found.stem, found.device, found.dtype)
    return LoadedPuzzleRun(path=run, model=model, device=found.device, which=f"{found.stem}.safetensors", step=found.step, recipe=recipe)


def puzzles_for(recipe: PuzzleRecipe, data: str | None = None) -> PuzzleSet:
    """The validation split of `data`, or of the recipe's own set. Raises Refusal for puzzles that the model cannot read: another game, or
    another size.
    """
    if data is None:
        return PuzzleSet(recipe.sources[0][0], VALIDATION, recipe.data.cache)
    found = PuzzleSet(data, VALIDATION)
    m = recipe.model
    asked = found.manifest
    if (m.vocabulary_size, m.cells) != (asked.vocabulary_size, asked.cells) or m.identifiers < asked.identifiers:
        raise Refusal(
            f"{data} holds puzzles of the game {asked.game}, {asked.height}x{asked.width} ({asked.cells} cells, {asked.vocabulary_size} "
            f"tokens), and the model of {recipe.run.dir} was trained on {m.cells} cells and {m.vocabulary_size} tokens: a grid of another "
            f"game or size means nothing to it. Give a set prepared like the run's own, {recipe.data.path}."
        )
    return found
