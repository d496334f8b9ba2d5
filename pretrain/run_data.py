"""What a run reads: the recipe completed by its prepared data, this rank's loaders, the tokenizer's text."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline import TokenLoader, ValidationLoader, open_manifest
from data_pipeline.token_bytes import tokenizer_file
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.mesh import Mesh


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with what only the prepared data knows: sequence length and vocabulary. Raises Refusal where they disagree."""
    path = recipe.sources[0][0]
    manifest = open_manifest(path, recipe.data.cache)
    return recipe.completed(manifest.vocabulary_size, manifest.sequence_length, path)


def tokenizer_text(recipe: Recipe) -> str | None:
    """The text of the data's tokenizer.json; None where a prepared set has lost it, which training does not need."""
    try:
        return tokenizer_file(recipe.sources[0][0], recipe.data.cache).read_text(encoding="utf-8")
    except Refusal:
        return None


class RunData(NamedTuple):
    """This rank's loaders."""

    training: TokenLoader
    validation: ValidationLoader


def open_data(recipe: Recipe, mesh: Mesh) -> RunData:
    """This rank's loaders: all ranks of a replica read the same. Raises Refusal for data that is damaged or does not fit the recipe."""
    from pretrain.evaluate import validation_loader

    training = TokenLoader(
        recipe.sources,
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        data_rank=mesh.where.data,
        data_ranks=mesh.layout.data,
        seed=recipe.train.seed,
        workers=recipe.data.workers,
        cache=recipe.data.cache,
        vocabulary_limit=recipe.model.vocabulary_size,
    )
    return RunData(training, validation_loader(recipe, mesh.where.data, mesh.layout.data, recipe.evaluation.tokens))
