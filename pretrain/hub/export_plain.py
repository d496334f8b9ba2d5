"""Code-free export: the stock architecture of transformers that computes a Transformer, or an attractor's proposal, exactly.

Our block is pre-norm RMSNorm with a gain, bias-free matrices, rotary halves, scores over sqrt(head_dim). What differs from one stock model
to the next is the MLP and the QK-norm (read from transformers 4.57's sources):

    swiglu, no QK-norm    Llama      down(silu(gate x) * up x)
    swiglu, QK-norm       Qwen3      the same, and an RMSNorm with gain on each head's queries and keys
    relu2,  no QK-norm    Arcee      down(relu(up x)^2)
    relu2,  QK-norm       Apertus    down(act(up x)), act = relu2, and the QK-norm of Qwen3

Stock QK-norm comes before the rotation, ours after. A rotation keeps the root mean square, so with gain 1 they are one map. Its epsilon
is that of all norms there, e = model.norm_eps; ours is fp32's, e' = 2^-23. norm(c q; e) = norm(q; e / c^2) makes them agree with queries
and keys scaled by c = sqrt(e / e'), which the exported matrices carry. (In bf16 our e' is 2^-7, and scaled matrices round anew: exact means
fp32.)

OLMo 2 norms after sub-layers, Nemotron has LayerNorm, nanochat's model norms its embedding: none of them fits. Nothing stock has value
embeddings, a loop or an equilibrium; those are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import BackboneConfig, ModelConfig
from pretrain.errors import Refusal
from pretrain.hub.export_config import use_fields, usual_fields

_FP32_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Stock:
    """An architecture of transformers."""

    model_type: str
    name: str
    activation: str
    gated: bool
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"

    @property
    def model_class(self) -> str:
        return f"{self.name}ForCausalLM"


STOCK = {
    ("swiglu", False): Stock("llama", "Llama", "silu", True),
    ("swiglu", True): Stock("qwen3", "Qwen3", "silu", True),
    ("relu2", False): Stock("arcee", "Arcee", "relu2", False),
    ("relu2", True): Stock("apertus", "Apertus", "relu2", False, "attention_layernorm", "feedforward_layernorm"),
}


def stock_architecture(architecture: ModelConfig, solver_iterations: int | str) -> Stock:
    """The one that fits. Raises Refusal where none does."""
    m = architecture.model
    if m.kind == "attractor" and solver_iterations != 0:
        raise Refusal(
            "--plain exports what transformers can compute without code of ours, and nothing stock solves for an equilibrium: of an "
            "attractor only the proposal fits. Add --solver-iterations 0 to export that alone, without the attractor (its loss is the one "
            "at 0 iterations), or leave out --plain."
        )
    if m.kind not in ("attractor", "transformer"):
        what = "an equilibrium" if m.kind == "deq" else "a loop"
        raise Refusal(
            f"--plain cannot export a {m.kind}: its output goes through {what}, which no stock architecture of transformers has, and "
            f"without it the model is none. Leave out --plain: the export then carries its own modelling file (trust_remote_code=True)."
        )
    if m.value_embeddings:
        raise Refusal(
            "--plain cannot export a model with value embeddings (model.value_embeddings): no stock architecture of transformers adds a "
            "table of the tokens to attention's values. Leave out --plain: the export then carries its own modelling file "
            "(trust_remote_code=True)."
        )
    return STOCK[m.mlp, m.qk_norm]


def plain_document(m: BackboneConfig, stock: Stock, *, sequence_length: int, begin_id: int, dtype: str, version: str) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": [stock.model_class],
        "model_type": stock.model_type,
        **usual_fields(m),
        "hidden_act": stock.activation,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        **use_fields(sequence_length, begin_id, dtype, version),
    }


def plain_names(m: BackboneConfig, stock: Stock) -> dict[str, str]:
    """Our name of every tensor, by the stock one; a QK-norm's gain has none of ours ("")."""
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    if not m.tied_embeddings:
        names["lm_head.weight"] = "head.weight"
    parts = {
        f"{stock.attention_norm}.weight": "attention_norm.weight",
        f"{stock.mlp_norm}.weight": "mlp_norm.weight",
        **{f"self_attn.{short}_proj.weight": f"attention.{ours}.weight" for short, ours in zip("qkvo", _ATTENTION, strict=True)},
        **{f"mlp.{part}_proj.weight": f"mlp.{part}.weight" for part in ("up", "down", *(("gate",) if stock.gated else ()))},
    }
    for layer in range(m.backbone_layers):
        names |= {f"model.layers.{layer}.{theirs}": f"backbone.blocks.{layer}.{ours}" for theirs, ours in parts.items()}
        if m.qk_norm:
            names |= {f"model.layers.{layer}.self_attn.{part}_norm.weight": "" for part in "qk"}
    return names


_ATTENTION = ("query", "key", "value", "out")


def plain_tensors(
    m: BackboneConfig, stock: Stock, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Shapes by stock name, and what reads one, from shapes and reader of our tensors. Scaled matrices are fp32."""
    names = plain_names(m, stock)
    scale = math.sqrt(m.norm_eps / _FP32_EPSILON) if m.qk_norm else 1.0

    def scaled(name: str) -> bool:
        return scale != 1 and name.endswith(("q_proj.weight", "k_proj.weight"))

    def read_plain(name: str) -> Tensor:
        if not names[name]:
            return torch.ones(m.head_dim)
        value = read(names[name])
        return (value.double() * scale).float() if scaled(name) else value

    announced: dict[str, Tensor] = {}
    for name, ours in names.items():
        shape = shapes[ours].shape if ours else (m.head_dim,)
        dtype = torch.float32 if scaled(name) or not ours else shapes[ours].dtype
        announced[name] = torch.empty(shape, dtype=dtype, device="meta")
    return announced, read_plain
