"""What a published config.json says, as an architecture of ours; what of it we lack is refused by name.

    _class_name        AttractorConfig, EQLMConfig -> attractor      GPTConfig -> transformer      ParcaeConfig -> parcae

The class may also stand under model_class_name or architecture_class_name (training runs), and a GPT's not at all. Defaults are those of
the published dataclasses. An option changes nothing (NEUTRAL), has one value here (FIXED), or is translated; one that is in none of
these is refused, since it may change numbers. Source: the public code of arXiv 2605.12466 (attractor/models/*/config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import AttractorConfig, BackboneConfig, GradientConfig, Kind, LoopConfig, ModelConfig, SolverConfig
from pretrain.errors import Refusal
from pretrain.hub.published_options import Options
from pretrain.hub.published_scales import read_scales

CLASSES: dict[str, Kind] = {
    "AttractorConfig": "attractor",
    "Attractor": "attractor",
    "EQLMConfig": "attractor",
    "EQLM": "attractor",
    "GPTConfig": "transformer",
    "GPT": "transformer",
    "ParcaeConfig": "parcae",
    "Parcae": "parcae",
}
NEUTRAL = frozenset(
    {
        "name",
        "hf_config",
        "_class_name",
        "model_class_name",
        "architecture_class_name",
        "attn_impl",
        "init_orthogonal",
        "skip_initialization",
        "debias_attention",
        "center_attention",
        "activation_checkpoint_impl",
        "simple_ops",
        "strategy",
        "sampling_scheme",
        "lockstep_n",
        "lockstep_k",
        "curriculum_target",
        "recurrent_iteration_method",
        "_is_recurrent_block_config",
        "model_type",
        "architectures",
        "torch_dtype",
        "transformers_version",
    }
)
"""Names, initialisation, how training draws counts or recomputes, which kernel, what is measured: no logit depends on it."""
FIXED: dict[str, tuple[Any, Any]] = {
    "block_class_name": ("TransformerPreNormBlock", "TransformerPreNormBlock"),
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "bias": (False, False),
    "qk_bias": (False, False),
    "clip_qkv": (None, None),
    "logit_softcap": (None, None),
    "causal": (True, True),
    "use_abacus": (False, False),
    "randomize_positions_from": (None, None),
    "mup_model_scaling_factor": (1, 1),
}
"""option: (the one value there is here, the published default)."""
FIXED_OF_PARCAE: dict[str, tuple[Any, Any]] = {
    "injection_type": ("diagonal", "diagonal"),
    "prelude_norm": (True, False),
    "state_init": ("like-init", "like-init"),
}
MLPS = {("BaseMLP", "ReLU2"): "relu2", ("GatedMLP", "SiLU"): "swiglu"}


@dataclass(frozen=True)
class PublishedModel:
    """A published configuration, translated."""

    architecture: ModelConfig
    embedding_scale: float
    """What the published forward multiplies the embedding with."""
    logit_scale: float
    """What it multiplies the logits with."""
    transposed_head: bool
    """Whether an untied unembedding is stored [width, vocabulary]."""
    block_size: int
    """Tokens a sequence, and positions in the stored rotary table."""
    optimizer: dict[str, float] = field(default_factory=dict)
    """Keys of the recipe's optimizer section that belong to the architecture."""

    @property
    def kind(self) -> Kind:
        return self.architecture.model.kind


def kind_of(config: Mapping[str, Any], where: Path) -> Kind:
    """Which model it is. Raises Refusal for a class that is none of the published ones."""
    named = next((config[key] for key in ("_class_name", "model_class_name", "architecture_class_name") if key in config), None)
    if named is None and "n_layer" in config:
        return "transformer"  # a GPT's training run names no class
    if not isinstance(named, str) or named not in CLASSES:
        raise Refusal(
            f"{where} names the class {named!r}, which is none of {', '.join(CLASSES)}: it is no published model's configuration."
        )
    return CLASSES[named]


def read_config(config: Mapping[str, Any], where: Path) -> PublishedModel:
    """The architecture that a config.json describes. Raises Refusal for what it has and the models here lack."""
    kind = kind_of(config, where)
    options = Options(config, where)
    for name, (value, default) in {**FIXED, **(FIXED_OF_PARCAE if kind == "parcae" else {})}.items():
        options.fixed(name, value, default)
    try:
        loop = _loop(options) if kind == "parcae" else LoopConfig()
        model = _backbone(options, kind, loop)
        attractor = _attractor(options) if kind == "attractor" else (AttractorConfig(), SolverConfig(), GradientConfig(), {})
        architecture = ModelConfig(model, attractor[0], attractor[1], attractor[2], loop)
    except ValueError as error:
        raise Refusal(f"{where} describes no model that could be built here: {error}") from error
    embedding_scale, logit_scale = read_scales(options, kind, model.width)
    fused, block_size = options.get("use_fused_head", "pytorch", str, bool, type(None)), options.get("block_size", 4096, int)
    options.refuse_rest(NEUTRAL)
    transposed = kind == "transformer" or fused == "full-triton" or (kind == "parcae" and fused == "hhe")
    return PublishedModel(architecture, embedding_scale, logit_scale, transposed, block_size, attractor[3])


def _backbone(options: Options, kind: Kind, loop: LoopConfig) -> BackboneConfig:
    width, heads = options.needed("n_embd", int), options.needed("num_attention_heads", int)
    kv_heads = options.get("num_key_value_heads", None, int, type(None))
    hidden = options.get("intermediate_size", None, int, type(None)) or 4 * width
    mlp = (options.get("mlp_class_name", "BaseMLP", str), options.get("nonlin_name", "GELU", str))
    if mlp not in MLPS:
        known = ", ".join(f"{name} of {nonlinearity}" for name, nonlinearity in MLPS)
        raise Refusal(f"{options.where} has mlp_class_name={mlp[0]!r} with nonlin_name={mlp[1]!r}; the models here have {known}.")
    if kind == "attractor":
        layers = options.needed("n_backbone_layers", int)
        options.get("recurrent_embedding_dimension", None, int, type(None))  # the published code gives it and reads it nowhere
    elif kind == "transformer":
        layers = options.needed("n_layer", int)
    else:
        layers = options.needed("n_layers_in_prelude", int) + loop.core + loop.coda
        _refuse_other_core(options, width, heads, kv_heads, hidden)
    return BackboneConfig(
        kind=kind,
        vocabulary_size=_rows(options),
        width=width,
        heads=heads,
        kv_heads=None if kv_heads in (None, heads) else kv_heads,
        backbone_layers=layers,
        mlp=MLPS[mlp],  # type: ignore[arg-type]
        mlp_width=None if hidden == 4 * width else hidden,
        qk_norm=options.get("qk_norm", False, bool),
        rope_base=_rope_base(options),
        norm_eps=options.get("norm_eps", 1e-5, float),
        value_embeddings=kind == "transformer" or (kind == "parcae" and _values_reach(options, layers, loop)),
        tied_embeddings=options.get("tie_embeddings", kind == "attractor", bool),
    )


def _rows(options: Options) -> int:
    """Rows of the embedding: the vocabulary, padded."""
    vocabulary, multiple = options.needed("vocab_size", int), options.get("padding_multiple", 512, int)
    padded = options.get("padded_vocab_size", None, int, type(None))
    return int(padded or -(-vocabulary // max(multiple, 1)) * max(multiple, 1))


def _rope_base(options: Options) -> float:
    """The rotary base that the configuration states; the stored table has the last word (published_names.rotary_base)."""
    inner = Options(options.get("rope_settings", {}, dict), options.where)
    inner.fixed("use_rope", True, True)
    inner.fixed("rope_condense_ratio", 1, 1)
    base: float = inner.get("rope_base", 50_000, float)
    inner.refuse_rest(frozenset())
    return base


def _attractor(options: Options) -> tuple[AttractorConfig, SolverConfig, GradientConfig, dict[str, float]]:
    initial = options.get("layer_scale_init", 0.25, float, type(None))
    if initial is None:
        raise Refusal(
            f"{options.where} has layer_scale_init=None: an attractor without gates, which the models here lack. It is not imported."
        )
    maximum = options.get("gamma_max", 1.0, float, type(None)) or 1.0
    gates = AttractorConfig(
        layers=options.needed("n_fp_blocks", int), gate_initial=min(max(initial, 1e-6 * maximum), maximum), gate_maximum=maximum
    )
    most, tolerance = options.get("max_iter", 12, int), options.get("tol", 1e-3, float)
    name = options.get("solver", "anderson", str)
    if name not in ("anderson", "fpi"):
        raise Refusal(f"{options.where} has solver={name!r}; the published ones are anderson and fpi.")
    options.get("anderson_m", 5, int)
    damping = options.get("anderson_beta", 1.0, float)
    picard = name == "fpi" or most < 3  # with so few, the published code iterates plainly
    solver = SolverConfig(
        method="picard" if picard else "anderson",
        damping=1.0 if picard else damping,
        tolerance=tolerance,
        max_iterations=most,
        min_iterations=min(max(options.get("min_iter", 0, int), 1), most),
    )
    for unused in ("backward_min_iter", "fp_lr_scale", "fp_wd"):
        options.get(unused, 0.0, int, float, type(None))
    optimizer = {"attractor_lr_scale": options.get("fp_lr_scale", 0.75, float), "attractor_weight_decay": options.get("fp_wd", 0.0, float)}
    return gates, solver, _gradient(options), optimizer


def _gradient(options: Options) -> GradientConfig:
    """onestep is u = v + J^T v, Neumann with one step here; anderson and picard solve the adjoint."""
    kind = options.get("backward_type", "onestep", str)
    clip = options.get("adjoint_grad_clip", 1.0, float, type(None))
    most = options.get("backward_max_iter", None, int, type(None))
    tolerance = options.get("backward_tol", None, float, type(None))
    if kind == "onestep":
        return GradientConfig(mode="neumann", steps=1, clip=clip)
    if kind not in ("anderson", "picard"):
        raise Refusal(f"{options.where} has backward_type={kind!r}; the published ones are onestep, anderson and picard.")
    return GradientConfig(mode="adjoint", clip=clip, tolerance=tolerance, max_iterations=most)


def _loop(options: Options) -> LoopConfig:
    return LoopConfig(
        core=options.needed("n_layers_in_recurrent_block", int),
        coda=options.needed("n_layers_in_coda", int),
        iterations=options.get("mean_recurrence", 32, int),
        backprop=options.get("mean_backprop_depth", 8, int),
    )


def _refuse_other_core(options: Options, width: int, heads: int, kv_heads: int | None, hidden: int) -> None:
    """Raises Refusal for looped blocks of another shape than the rest."""
    options.fixed("recurrent_embedding_dimension", width, 1024)
    options.fixed("recurrent_intermediation_embedding_dimension", hidden, 3520)
    if options.get("recurrent_num_attention_heads", None, int, type(None)) is not None:
        options.fixed("recurrent_num_attention_heads", heads, None)
    if kv_heads is not None:  # the looped blocks have as many as query heads
        options.fixed("num_key_value_heads", heads, heads)


def _values_reach(options: Options, layers: int, loop: LoopConfig) -> bool:
    """Whether value embeddings reach every other block, the last included, as here; raises Refusal where they reach others.

    The published Parcae numbers blocks twice: tables by block, gates by block of the unrolled network (the coda comes after
    core * mean_recurrence blocks) and by a parity of its own (core * mean_backprop_depth). Only a block with both reads a table.
    """
    prelude, gates_parity = layers - loop.core - loop.coda, (loop.core * (loop.backprop or 0) - 1) % 2
    unrolled = [*range(prelude + loop.core), *(prelude + loop.core * loop.iterations + block for block in range(loop.coda))]
    tables = {block for block in range(layers) if block % 2 == (layers - 1) % 2}
    gates = {block for block, number in enumerate(unrolled) if number % 2 == gates_parity}
    if tables != gates:
        raise Refusal(
            f"{options.where} has value embeddings for the blocks {sorted(tables)} and gates for them in the blocks {sorted(gates)}, as "
            f"n_layers_in_recurrent_block, mean_recurrence and mean_backprop_depth make it: the models here have both in the same blocks."
        )
    return True
