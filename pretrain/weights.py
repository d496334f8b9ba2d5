"""Whole weights out of an engine, and a run's model back from its newest checkpoint: safetensors, by parameter name.

Each checkpoint holds `weights.safetensors` beside DeepSpeed's sharded state, so that evaluation, and later export, need no
engine and no particular number of ranks; with an average of the weights also `average.safetensors`, which evaluation prefers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.language_model import LanguageModel, build
from pretrain import checkpoint_files as files
from pretrain.agreement import rank
from pretrain.checkpoint import newest_whole
from pretrain.config import Recipe
from pretrain.ema import averaged_weights
from pretrain.errors import Refusal
from pretrain.run_folder import CHECKPOINTS, CONFIG
from pretrain.runtime import device_of
from pretrain.zero import client_optimizer

WEIGHTS, AVERAGE = "weights.safetensors", "average.safetensors"


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter whole, on the CPU, on rank 0; nothing on other ranks. Collective under ZeRO 3, a parameter at a time."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return weights


def weight_files(engine: Any) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds besides DeepSpeed's state, by file name: the weights, and their average where one is kept."""
    files_of_rank_0 = {WEIGHTS: gather_weights(engine)}
    if client_optimizer(engine).ema is not None:
        with averaged_weights(engine):
            files_of_rank_0[AVERAGE] = gather_weights(engine)
    return files_of_rank_0 if rank() == 0 else {}


@dataclass(frozen=True)
class LoadedRun:
    recipe: Recipe
    model: LanguageModel
    device: torch.device
    step: int
    which: str
    """The file the weights came from."""


def load_run(run: Path) -> LoadedRun:
    """The model of a run's newest whole checkpoint, in eval mode, in the precision it trained in. Raises Refusal."""
    config = run / CONFIG
    if not config.is_file():
        raise Refusal(f"There is no run in {run}: it has no {CONFIG}. Give the folder that `attractor train` wrote (run.dir).")
    recipe = Recipe.from_yaml(config.read_text(encoding="utf-8"), str(config))
    folder = newest_whole(run / CHECKPOINTS)
    path = folder / AVERAGE if (folder / AVERAGE).exists() else folder / WEIGHTS
    device = device_of(recipe.train.device if recipe.train.device == "cpu" else "auto")
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = build(recipe.architecture, device="meta")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in load_file(path).items()}, assign=True)
    return LoadedRun(recipe, model.eval(), device, files.step_of(folder.name), path.name)
