"""A model to use, from a run or from an export, and what is needed to use it: tokenizer, begin token, length. No engine.

    run       the newest whole checkpoint of RUN/checkpoints; the average of its weights where one is kept
    export    what `attractor export` wrote (pretrain/hub/export.py)

A run's tokenizer is RUN/tokenizer.json, which training leaves there; of a run that has none, that of its data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import nn

from data_pipeline.token_bytes import tokenizer_file
from model.config import ModelConfig
from model.cost import count_parameters
from model.language_model import LanguageModel, build
from pretrain.canonical import AVERAGE, WEIGHTS
from pretrain.config import AnyRecipe, Recipe, read_recipe
from pretrain.errors import Refusal
from pretrain.run_folder import CHECKPOINTS, CONFIG, TOKENIZER
from pretrain.runtime import device_of
from pretrain.tensor_files import TensorFiles, holds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Built = TypeVar("Built", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in eval mode, in the precision it trained in unless another was asked for."""

    path: Path
    """The run or the export."""
    model: LanguageModel
    device: torch.device
    which: str
    """The file the weights came from."""
    find_tokenizer: Callable[[], Path]
    """Its tokenizer.json; raises Refusal where there is none."""
    sequence_length: int
    """Tokens it was trained on at a time."""

    @property
    def architecture(self) -> ModelConfig:
        return self.model.config

    def tokenizer(self) -> Tokenizer:
        """Opened, set to encode a text as it is. Raises Refusal for one that does not fit the model's vocabulary."""
        from data_pipeline import open_tokenizer

        file = self.find_tokenizer()
        tokenizer = open_tokenizer(file)
        refuse_misfit(tokenizer, self.architecture.model.vocabulary_size or 0, file)
        return tokenizer

    @property
    def begin_id(self) -> int:
        """The token that begins every document, in training and hence in use."""
        from data_pipeline.tokenizer import begin_id

        return begin_id(self.tokenizer(), str(self.find_tokenizer()))


@dataclass(frozen=True, kw_only=True)
class LoadedRun(LoadedModel):
    """Of a run, at the checkpoint of `step`."""

    step: int
    recipe: Recipe


def load_model(path: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model of a run folder or of an export. Raises Refusal for a path that is neither."""
    if (path / CONFIG).is_file():
        return load_run(path, device=device, dtype=dtype)
    if (path / "config.json").is_file():
        from pretrain.hub.export import load_export

        return load_export(path, device=device, dtype=dtype)
    raise Refusal(
        f"{path} is neither a run nor an export: it has no {CONFIG} and no config.json. Give the folder that `attractor train` or "
        f"`attractor export` wrote."
    )


def load_run(run: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LoadedRun:
    """The model of a run's newest whole checkpoint. Raises Refusal."""
    recipe = recipe_of(run)
    found = newest_weights(run, recipe, device, dtype)
    return LoadedRun(
        path=run,
        model=load_weights(recipe.architecture, found.folder, found.stem, found.device, found.dtype),
        device=found.device,
        which=f"{found.stem}.safetensors",
        find_tokenizer=partial(tokenizer_of, run, recipe),
        sequence_length=recipe.data.sequence_length or 0,
        step=found.step,
        recipe=recipe,
    )


class Weights(NamedTuple):
    """Which weights of a run are used: FOLDER/STEM of the checkpoint of `step`, where, and in what precision."""

    folder: Path
    stem: str
    step: int
    device: torch.device
    dtype: torch.dtype


def newest_weights(run: Path, recipe: AnyRecipe, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Weights:
    """Those of the newest whole checkpoint, of either regime, as the recipe trained unless another device or precision is given. Raises
    Refusal where there is none.
    """
    from pretrain import checkpoint_files as files
    from pretrain.checkpoint_choice import newest_whole

    folder = newest_whole(run / CHECKPOINTS)
    stem = AVERAGE if holds(folder, AVERAGE) else WEIGHTS
    device = device or device_of(recipe.train.device if recipe.train.device == "cpu" else "auto")
    dtype = dtype or (torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    return Weights(folder, stem, files.step_of(folder.name), device, dtype)


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a language model's run folder. Raises Refusal for a folder that holds no such run."""
    return Recipe.from_yaml(_stored_recipe(run), str(run / CONFIG))


def any_recipe_of(run: Path) -> AnyRecipe:
    """The resolved recipe of a run folder of either regime. Raises Refusal for a folder that holds no run."""
    return read_recipe(_stored_recipe(run), str(run / CONFIG))


def _stored_recipe(run: Path) -> str:
    config = run / CONFIG
    if not config.is_file():
        raise Refusal(f"There is no run in {run}: it has no {CONFIG}. Give the folder that `attractor train` wrote (run.dir).")
    return config.read_text(encoding="utf-8")


def tokenizer_of(run: Path, recipe: Recipe) -> Path:
    """A run's tokenizer.json. Raises Refusal where neither the run nor its data has one."""
    kept = run / TOKENIZER
    if not kept.is_file() and recipe.data.path is None:
        raise Refusal(f"{run} has no {TOKENIZER} and names no data to take one from. Put the model's tokenizer.json into it.")
    return kept if kept.is_file() else tokenizer_file(recipe.sources[0][0], recipe.data.cache)


def refuse_misfit(tokenizer: Tokenizer, rows: int, where: object) -> None:
    """Raises Refusal for a tokenizer with ids that an embedding of `rows` lacks. where: its file."""
    from data_pipeline.tokenizer import id_count

    if (ids := id_count(tokenizer)) > rows:
        raise Refusal(
            f"The tokenizer {where} has ids up to {ids - 1:,}, and the model's embedding {rows:,} rows: it is not this model's tokenizer. "
            f"Give the one it was trained with."
        )


def load_weights(architecture: ModelConfig, folder: Path, stem: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model of that architecture with the tensors of FOLDER/STEM, in eval mode. Raises Refusal for tensors that are not its own."""
    numbers = count_parameters(architecture).total
    return read_weights(lambda: build(architecture, device="meta"), numbers, folder, stem, device, dtype)


def read_weights(made: Callable[[], Built], numbers: int, folder: Path, stem: str, device: torch.device, dtype: torch.dtype) -> Built:
    """What `made` makes on the meta device, of so many parameters, with the tensors of FOLDER/STEM, in eval mode. Raises Refusal for
    tensors that are not its own.
    """
    with TensorFiles(folder, stem) as tensors:
        _refuse_more(numbers, tensors.shapes, folder)
        model = made()
        refuse_other_tensors(dict(model.named_parameters()), tensors.shapes, folder)
        state = {name: tensors.read(name).to(device, dtype) for name in tensors.shapes}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(True)


def refuse_larger(architecture: ModelConfig, found: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raises Refusal for a model of more than twice the size found: a configuration of any size is refused before its model is built."""
    _refuse_more(count_parameters(architecture).total, found, where)


def _refuse_more(wanted: int, found: Mapping[str, torch.Tensor], where: Path) -> None:
    there = sum(tensor.numel() for tensor in found.values())
    if wanted > 2 * there:
        raise Refusal(
            f"The weights in {where} hold {there:,} numbers, and the model that its configuration describes has {wanted:,}. They are not "
            f"of one model: copy both again from their source."
        )


def refuse_other_tensors(wanted: dict[str, torch.nn.Parameter], found: dict[str, torch.Tensor], where: Path) -> None:
    """Raises Refusal unless the names and shapes are the same."""
    for kind, names in (("lacks", wanted.keys() - found.keys()), ("has an unknown tensor:", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refusal(
                f"The weights in {where} {kind} {min(names)}{more}. They are not those of the model that its configuration describes."
            )
    for name, parameter in wanted.items():
        if parameter.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)} and must be {tuple(parameter.shape)}"
            raise Refusal(f"The weights in {where} are not those of the model its configuration describes: {name} has the shape {shapes}.")
