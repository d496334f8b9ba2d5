"""The DeepSpeed engine of a recipe: its configuration, the optimizer by roles, ZeRO over the data ranks, a pipeline over stages.

    fp32   weights, gradients and moments in fp32
    bf16   weights and products in bf16; gradients are accumulated and reduced, masters and moments kept, in fp32 by DeepSpeed

Under ZeRO 3 the module that holds the solver's loop, or the looped blocks, is a leaf: gathered once, whatever the iterations on each rank.
"""

from __future__ import annotations

import gc
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import nn

from model.language_model import LanguageModel, build
from model.layers import Layers, PlainLayers
from model.roles import parameter_roles
from pretrain import zero
from pretrain.config import AnyRecipe, Recipe
from pretrain.mesh import Mesh
from pretrain.optimizer import MuonAdamW, build_optimizer
from pretrain.partition import Stage, partition


def build_model(recipe: Recipe, device: torch.device, mesh: Mesh) -> LanguageModel:
    """This rank's part of the recipe's model in fp32, compiled if the recipe says so.

    Its first weights depend on train.seed alone. What other stages hold is on the meta device.
    """
    layers, seed = _layers(recipe, mesh), recipe.train.seed
    if mesh.layout.pipeline == 1:
        model = build(recipe.architecture, layers=layers, device=device, seed=seed, recompute=recipe.train.recompute)
    else:
        from pretrain.stages import materialise_stage

        model = build(recipe.architecture, layers=layers, device="meta", recompute=recipe.train.recompute)
        materialise_stage(model, stages_of(recipe, mesh), mesh.where.pipe, device, seed)
    if recipe.train.compile:
        model.compile_maps(by_block=mesh.layout.pipeline > 1)
    return model


def _layers(recipe: Recipe, mesh: Mesh) -> Layers:
    if mesh.tensor_group is None or mesh.layout.tensor == 1:
        return PlainLayers()
    from pretrain.tensor_parallel import TensorParallelLayers  # megatron is imported where it is used

    return TensorParallelLayers(mesh.tensor_group, recipe.layout.sequence_parallel)


def stages_of(recipe: Recipe, mesh: Mesh) -> list[Stage]:
    """The stages of a recipe whose sequence length is known."""
    assert recipe.data.sequence_length is not None
    return partition(recipe.architecture, recipe.data.sequence_length, mesh.layout.pipeline, recompute=recipe.train.recompute)


def build_engine(recipe: Recipe, model: LanguageModel, accumulation: int, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a language model; a pipeline's module is a Stages."""
    if recipe.layout.zero == 3 and model.refine is not None:
        set_z3_leaf_modules(model, [type(model.refine)])
    fused = any(parameter.is_cuda for parameter in model.parameters())
    optimizer = build_optimizer(model, parameter_roles(model), recipe.optimizer, fused=fused)
    module: Any = model
    if mesh.layout.pipeline > 1:
        from pretrain.stages import Stages

        module = Stages(model, stages_of(recipe, mesh), mesh)
    engine = start_engine(recipe, module, optimizer, accumulation, mesh)
    if mesh.layout.pipeline > 1:
        zero.reduce_tied_last(engine)
    return engine


def start_engine(recipe: AnyRecipe, module: nn.Module, optimizer: MuonAdamW, accumulation: int, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a module of either regime, with the client optimizer fitted to its layout."""
    groups.mpu = None  # DeepSpeed would go on with that of this process's last engine
    gc.freeze()  # for a bf16 optimizer DeepSpeed collects garbage 25 times: seconds, if all that was imported is looked at
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(recipe, accumulation),
            mpu=mesh.grid if mesh.layout.pipeline == 1 else None,  # a pipeline brings its own
            dist_init_required=False,
        )
    finally:
        gc.unfreeze()
    zero.attach(engine, recipe.optimizer.clip, mesh)
    return engine


def model_of(engine: Any) -> nn.Module:
    """The model inside an engine, of either regime, whole or one stage of it: its parameters have their canonical names."""
    module = engine.module
    return module.model if isinstance(module, PipelineModule) else module


def language_model(engine: Any) -> LanguageModel:
    """The language model inside an engine, whole or one stage of it."""
    model = model_of(engine)
    assert isinstance(model, LanguageModel)
    return model


def deepspeed_config(recipe: AnyRecipe, accumulation: int) -> dict[str, Any]:
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
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},  # tokens are divided by sequence parallelism, or not at all
    }
    if recipe.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
