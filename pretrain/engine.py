"""The DeepSpeed engine of a recipe: its configuration, the optimizer by roles, ZeRO over the data ranks.

    fp32   weights, gradients and moments in fp32
    bf16   weights and products in bf16; gradients accumulated, reduced weights and moments kept in fp32 by DeepSpeed

Under ZeRO 3 the module that holds the solver's loop is a leaf: gathered once a solve, whatever the iterations on each rank.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules

from model.language_model import LanguageModel, build
from model.refine import Refine
from model.roles import parameter_roles
from pretrain import zero
from pretrain.config import Recipe
from pretrain.optimizer import build_optimizer


def build_model(recipe: Recipe, device: torch.device) -> LanguageModel:
    """The recipe's model in fp32, with its first weights (which depend on train.seed alone), compiled if the recipe says so."""
    model = build(recipe.architecture, device=device, seed=recipe.train.seed, recompute=recipe.train.recompute)
    if recipe.train.compile:
        model.compile_maps()
    return model


def build_engine(recipe: Recipe, model: LanguageModel, accumulation: int) -> Any:
    """A DeepSpeed engine around the model, with the client optimizer fitted to its layout."""
    if recipe.layout.zero == 3 and model.refine is not None:
        set_z3_leaf_modules(model, [Refine])
    fused = next(model.parameters()).is_cuda
    optimizer = build_optimizer(model, parameter_roles(model), recipe.optimizer, fused=fused)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(recipe, accumulation), dist_init_required=False
    )
    zero.attach(engine, recipe.optimizer.clip)
    return engine


def deepspeed_config(recipe: Recipe, accumulation: int) -> dict[str, Any]:
    """What DeepSpeed is told. The schedule, the loss scale of 1 and the loader are ours."""
    fp32_alone = recipe.train.precision == "fp32" and recipe.layout.zero == 0  # there the optimizer clips: see pretrain.zero
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if fp32_alone else recipe.optimizer.clip,
        "zero_optimization": {"stage": recipe.layout.zero, "memory_efficient_linear": False},  # it would replace F.linear process-wide
        "communication_data_type": "fp32",  # the default reduces bf16 gradients in bf16: 3e-3 off after 5 steps
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    if recipe.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
