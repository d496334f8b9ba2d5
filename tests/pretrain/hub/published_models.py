"""Published models in miniature: their configurations, random weights under their names, and what they compute, written from the formulas.

The reference works on the published names and in the published conventions: rotary pairs of neighbouring channels in fp32, relu(x)^2 / 2,
Head(y + y0) - y for the map, dense matrices throughout. It shares no code with what is under test.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEADS, HIDDEN, ROWS, BLOCK = 64, 4, 96, 96, 24
State = dict[str, Tensor]

_COMMON: dict[str, Any] = {
    "name": "tiny",
    "hf_config": {"org": "nobody", "name": "tiny"},
    "block_size": BLOCK,
    "n_embd": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": 90,
    "padding_multiple": 32,
    "padded_vocab_size": ROWS,
    "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000},
    "use_abacus": False,
    "randomize_positions_from": None,
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "attn_impl": "flash",
    "norm_eps": 1e-5,
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "bias": False,
    "qk_bias": False,
    "init_strategy": "scaled-zero",
    "init_orthogonal": True,
    "skip_initialization": False,
    "mup_model_scaling_factor": 1,
    "use_fused_head": "pytorch",
    "debias_attention": False,
    "center_attention": False,
    "clip_qkv": None,
    "qk_norm": True,
    "logit_softcap": None,
    "causal": True,
    "activation_checkpoint_impl": "per-block",
    "simple_ops": False,
    "strategy": "single",
    "tie_embeddings": True,
}
_OWN: dict[str, dict[str, Any]] = {
    "attractor": {
        "n_backbone_layers": 2,
        "n_fp_blocks": 2,
        "solver": "fpi",
        "max_iter": 64,
        "min_iter": 2,
        "tol": 1e-6,
        "anderson_m": 5,
        "anderson_beta": 1.0,
        "backward_type": "onestep",
        "backward_max_iter": 64,
        "backward_min_iter": 2,
        "backward_tol": 1e-6,
        "adjoint_grad_clip": None,
        "layer_scale_init": 0.5,
        "gamma_max": 0.75,
        "fp_lr_scale": 0.5,
        "fp_wd": 0.1,
        "recurrent_embedding_dimension": WIDTH,
        "model_class_name": "Attractor",
        "_class_name": "AttractorConfig",
    },
    "gpt": {"n_layer": 3, "_class_name": "GPTConfig"},
    "parcae": {
        "injection_type": "diagonal",
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_prelude": 1,
        "n_layers_in_coda": 1,
        "state_init": "like-init",
        "recurrent_embedding_dimension": WIDTH,
        "recurrent_intermediation_embedding_dimension": HIDDEN,
        "recurrent_num_attention_heads": None,
        "prelude_norm": True,
        "sampling_scheme": "poisson-truncated-full",
        "mean_recurrence": 8,
        "mean_backprop_depth": 4,
        "lockstep_n": False,
        "lockstep_k": False,
        "curriculum_target": "forward",
        "recurrent_iteration_method": "per-sequence",
        "activation_checkpoint_impl": "per-iteration",
        "model_class_name": "Parcae",
        "_is_recurrent_block_config": False,
        "_class_name": "ParcaeConfig",
    },
}


def configuration(kind: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model, as the public save_pretrained writes it."""
    return {**_COMMON, **_OWN[kind], **changes}


def random_state(config: dict[str, Any], seed: int = 0) -> State:
    """Weights of that configuration by their published names, with the buffer that is stored among them."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=draw) * std + mean

    w, hidden, keys = (
        config["n_embd"],
        config["intermediate_size"],
        config["num_key_value_heads"] * config["n_embd"] // config["num_attention_heads"],
    )
    std, kind = 1 / math.sqrt(w), config["_class_name"]
    gated = config["mlp_class_name"] == "GatedMLP"

    def block(name: str, *, gate: bool = False, value_gate: bool = False, out: float = 1.0) -> State:
        state = {
            "norm_1.weight": normal(w, std=0.2, mean=1),
            "attn.c_q.weight": normal(w, w, std=std),
            "attn.c_k.weight": normal(keys, w, std=std),
            "attn.c_v.weight": normal(keys, w, std=std),
            "attn.c_proj.weight": normal(w, w, std=out * std),
            "norm_2.weight": normal(w, std=0.2, mean=1),
            "mlp.fc.weight": normal(hidden * (1 + gated), w, std=std),
            "mlp.proj.weight": normal(w, hidden, std=out * std),
        }
        if value_gate:
            state["attn.ve_gate.weight"] = normal(config["num_key_value_heads"], 32, std=0.5)
        if gate:
            state |= {"raw_gamma_attn": normal(w, std=0.5), "raw_gamma_mlp": normal(w, std=0.5)}
        return {f"transformer.{name}.{part}": tensor for part, tensor in state.items()}

    state = {"transformer.wte.weight": normal(config["padded_vocab_size"], w, std=1.0)}
    if kind == "GPTConfig":
        n = config["n_layer"]
        for layer in range(n):
            state |= block(f"h.{layer}", value_gate=layer % 2 == (n - 1) % 2)
        tables = range(n)
    elif kind == "ParcaeConfig":
        prelude, core, coda = (config[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda"))
        n = prelude + core + coda
        for name, first, count in (("prelude", 0, prelude), ("core_block", prelude, core), ("coda", prelude + core, coda)):
            for layer in range(count):
                state |= block(f"{name}.{layer}", value_gate=(first + layer) % 2 == (n - 1) % 2)
        state |= {
            "transformer.adapter.A_log": normal(w, std=0.3),
            "transformer.adapter.dt_bias": normal(w, std=0.3),
            "transformer.adapter.B": normal(w, w, std=std),
            "transformer.C.weight": normal(w, w, std=std),
            "transformer.ln_prelude.weight": normal(w, std=0.2, mean=1),
        }
        tables = range(n)
    else:
        for layer in range(config["n_backbone_layers"]):
            state |= block(f"prelude.{layer}")
        for layer in range(config["n_fp_blocks"]):
            state |= block(f"core_block.{layer}", gate=True, out=0.3)  # a map that contracts
        n, tables = 0, range(0)
    state["transformer.ln_f.weight"] = normal(w, std=0.2, mean=1)
    state |= {
        f"value_embeds.{layer}.weight": normal(config["padded_vocab_size"], keys, std=1.0) for layer in tables if layer % 2 == (n - 1) % 2
    }
    transposed = kind == "GPTConfig" or config["use_fused_head"] == "full-triton"
    head = normal(config["padded_vocab_size"], w, std=std)
    state["lm_head.weight"] = state["transformer.wte.weight"] if config["tie_embeddings"] else head.T.contiguous() if transposed else head
    state["freqs_cis"] = angles(config)
    return state


def write_model(folder: Path, config: dict[str, Any], state: State, file: str = "model.pt") -> Path:
    """A folder as the public save_pretrained leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.save(state, folder / file)
    return folder


def angles(config: dict[str, Any]) -> Tensor:
    """The stored rotary table [1, positions, 1, d / 2, 2], in fp32 throughout."""
    d, rope = config["n_embd"] // config["num_attention_heads"], config["rope_settings"]
    frequency = 1.0 / (rope["rope_base"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    angle = torch.arange(config["block_size"], dtype=torch.float32)[:, None] / rope["rope_condense_ratio"] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1)[None, :, None]


def reference(config: dict[str, Any], state: State, tokens: Tensor, iterations: int, start: Tensor | None = None) -> Tensor:
    """Logits [b, s, rows] after so many iterations of the map or the loop; start: of Parcae's state."""
    return _Reference(config, state, tokens).logits(iterations, start)


class _Reference:
    def __init__(self, config: dict[str, Any], state: State, tokens: Tensor) -> None:
        self.c, self.p, self.tokens = config, state, tokens
        self.scale = math.sqrt(config["n_embd"]) if config["init_strategy"].startswith("takase") else 1.0
        self.logit_scale = math.sqrt(0.4 / config["n_embd"]) if config["init_strategy"] == "takase-scaled" else 1.0

    def logits(self, iterations: int, start: Tensor | None) -> Tensor:
        kind = self.c["_class_name"]
        x = self.scale * self.p["transformer.wte.weight"][self.tokens]
        for layer in range(
            self.c["n_layer"] if kind == "GPTConfig" else self.c.get("n_backbone_layers", self.c.get("n_layers_in_prelude", 0))
        ):
            x = self.block("h" if kind == "GPTConfig" else "prelude", layer, x, layer)
        if "n_fp_blocks" in self.c:
            x = self.solved(x, iterations)
        if kind == "ParcaeConfig":
            assert start is not None
            x = self.looped(x, start, iterations)
        x = self.norm(x, "ln_f")
        head = self.p["lm_head.weight"]
        transposed = not self.c["tie_embeddings"] and (kind == "GPTConfig" or self.c["use_fused_head"] == "full-triton")
        return self.logit_scale * (x @ (head if transposed else head.T))

    def solved(self, y0: Tensor, iterations: int) -> Tensor:
        y = y0
        for _ in range(iterations):
            h = y + y0
            for layer in range(self.c["n_fp_blocks"]):
                h = self.block("core_block", layer, h, None)
            y = h - y
        return y

    def looped(self, x: Tensor, h: Tensor, iterations: int) -> Tensor:
        prelude, core = self.c["n_layers_in_prelude"], self.c["n_layers_in_recurrent_block"]
        e, a = self.norm(x, "ln_prelude"), "transformer.adapter."
        step = F.softplus(self.p[a + "dt_bias"])
        for _ in range(iterations):
            h = torch.exp(-step * torch.exp(self.p[a + "A_log"])) * h + step * (e @ self.p[a + "B"].T)
            for layer in range(core):
                h = self.block("core_block", layer, h, prelude + layer)
        x = h @ self.p["transformer.C.weight"].T
        for layer in range(self.c["n_layers_in_coda"]):
            x = self.block("coda", layer, x, prelude + core + layer)
        return x

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.c["norm_eps"]) * self.p[f"transformer.{name}.weight"]

    def block(self, stack: str, layer: int, x: Tensor, table: int | None) -> Tensor:
        name = f"{stack}.{layer}"
        x = x + self.gate(name, "attn") * self.attention(name, self.norm(x, f"{name}.norm_1"), table)
        inner = self.norm(x, f"{name}.norm_2") @ self.p[f"transformer.{name}.mlp.fc.weight"].T
        if self.c["mlp_class_name"] == "GatedMLP":
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = 0.5 * inner.clamp(min=0) ** 2
        return x + self.gate(name, "mlp") * (inner @ self.p[f"transformer.{name}.mlp.proj.weight"].T)

    def gate(self, name: str, which: str) -> Tensor | float:
        raw = self.p.get(f"transformer.{name}.raw_gamma_{which}")
        return 1.0 if raw is None else self.c["gamma_max"] * torch.sigmoid(raw)

    def attention(self, name: str, x: Tensor, table: int | None) -> Tensor:
        batch, length, width = x.shape
        heads, keys = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        d = width // heads
        part = f"transformer.{name}.attn."
        q, k, v = ((x @ self.p[f"{part}c_{m}.weight"].T).view(batch, length, -1, d) for m in "qkv")
        if table is not None and f"value_embeds.{table}.weight" in self.p:
            gate = 2 * torch.sigmoid(x[..., :32] @ self.p[part + "ve_gate.weight"].T)
            v = v + gate[..., None] * self.p[f"value_embeds.{table}.weight"][self.tokens].view_as(v)
        q, k = self.turned(q), self.turned(k)
        if self.c["qk_norm"]:
            q, k = (z / torch.sqrt(z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps) for z in (q, k))
        k, v = (z.repeat_interleave(heads // keys, dim=2) for z in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -math.inf).softmax(-1), v)
        return mixed.reshape(batch, length, width) @ self.p[part + "c_proj.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.p["freqs_cis"][0, : x.shape[1], 0].unbind(-1)
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
