"""From published tensors to our parameters, number for number: which tensor, and what is done to it.

    wte                              embedding                      times the embedding's scale
    h, prelude, core_block           backbone.blocks, refine.attractor.blocks, refine.core.blocks
      norm_1, norm_2                 attention_norm, mlp_norm
      attn.c_q, attn.c_k             attention.query, key           rows of each head from pairs (0, 1), (2, 3) ... to halves
      attn.c_v, attn.c_proj          attention.value, out
      attn.ve_gate                   attention.value_gate.projection
      mlp.fc, mlp.proj               mlp.up, down                   down times 1/2: the published squared ReLU is relu(x)^2 / 2
                                     mlp.gate, up, down             of a GatedMLP: fc is gate over up
      raw_gamma_attn, raw_gamma_mlp  attention_gate.raw, mlp_gate.raw
    value_embeds.N                   value_embeddings of block N
    ln_prelude, adapter, C, coda     refine.norm, injection, readout, coda
    ln_f                             norm                           times the logits' scale, over the embedding's where it is tied
    lm_head                          head                           where it is not the embedding's own matrix

Rotary pairs: theirs turn channels 2i and 2i+1 by angle i, ours i and i + d/2. Moving the rows of query and key alike is exact: the
parameter-free QK norm and the dot product see a permutation. The table of angles, freqs_cis, is computed here: it is compared, then left.
Every published tensor is used, every parameter of ours has a source, or it is refused with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.language_model import build
from model.rotary import rotary_tables
from pretrain.errors import Refusal
from pretrain.hub.published_config import PublishedModel

TABLE, HEAD, EMBEDDING = "freqs_cis", "lm_head.weight", "transformer.wte.weight"
_CLOSE = 1e-3
"""Between cosines of up to thousands of radians in fp32 and those computed in float64."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _half(tensor: Tensor, which: int) -> Tensor:
    return tensor.chunk(2)[which]


def _halves_of_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * d, w]: row 2i of each head becomes row i, and row 2i+1 row i + d/2."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class Part(NamedTuple):
    """Where a parameter comes from."""

    source: str
    change: Callable[[Tensor], Tensor] = _same
    """From the published tensor, in fp32, to the parameter."""


def parts_of(model: PublishedModel) -> dict[str, Part]:
    """A source for each parameter of the model, by our name and in our order."""
    m, loop, prelude = model.architecture.model, model.architecture.loop, model.architecture.prelude
    gain = model.logit_scale / (model.embedding_scale if m.tied_embeddings else 1.0)
    parts = {
        "embedding.weight": Part(EMBEDDING, partial(_times, factor=model.embedding_scale)),
        "norm.weight": Part("transformer.ln_f.weight", partial(_times, factor=gain)),
        "head.weight": Part(HEAD, Tensor.t if model.transposed_head else _same),
        "refine.norm.weight": Part("transformer.ln_prelude.weight"),
        "refine.injection.decay_log": Part("transformer.adapter.A_log"),
        "refine.injection.step_bias": Part("transformer.adapter.dt_bias"),
        "refine.injection.input.weight": Part("transformer.adapter.B"),
        "refine.readout.weight": Part("transformer.C.weight"),
    }
    parts |= _stack(model, "transformer.h" if m.kind == "transformer" else "transformer.prelude", "backbone", range(prelude))
    parts |= _stack(model, "transformer.core_block", "refine.core", range(prelude, prelude + loop.core))
    parts |= _stack(model, "transformer.coda", "refine.coda", range(prelude + loop.core, m.backbone_layers))
    for block in range(model.architecture.attractor.layers):
        parts |= _block(model, f"transformer.core_block.{block}.", f"refine.attractor.blocks.{block}.")
    return {name: parts[name] for name in parameters_of(model.architecture)}


def parameters_of(architecture: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a model, by our names and in our order, fp32 on the meta device."""
    return {name: parameter.detach() for name, parameter in build(architecture, device="meta").named_parameters()}


def _stack(model: PublishedModel, theirs: str, ours: str, which: range) -> dict[str, Part]:
    """Blocks in a row, numbered from 0 in both names, with the value embeddings, whose published number is the block's in the model."""
    parts: dict[str, Part] = {}
    for number, block in enumerate(which):
        parts |= _block(model, f"{theirs}.{number}.", f"{ours}.blocks.{number}.")
        parts[f"{ours}.value_embeddings.{number}.weight"] = Part(f"value_embeds.{block}.weight")
    return parts


def _block(model: PublishedModel, theirs: str, ours: str) -> dict[str, Part]:
    m = model.architecture.model
    halves = partial(_halves_of_pairs, head_dim=m.head_dim)
    parts = {
        "attention_norm.weight": Part("norm_1.weight"),
        "attention.query.weight": Part("attn.c_q.weight", halves),
        "attention.key.weight": Part("attn.c_k.weight", halves),
        "attention.value.weight": Part("attn.c_v.weight"),
        "attention.out.weight": Part("attn.c_proj.weight"),
        "attention.value_gate.projection.weight": Part("attn.ve_gate.weight"),
        "attention_gate.raw": Part("raw_gamma_attn"),
        "mlp_norm.weight": Part("norm_2.weight"),
        "mlp_gate.raw": Part("raw_gamma_mlp"),
    }
    if m.mlp == "relu2":
        parts |= {"mlp.up.weight": Part("mlp.fc.weight"), "mlp.down.weight": Part("mlp.proj.weight", partial(_times, factor=0.5))}
    else:
        parts |= {
            "mlp.gate.weight": Part("mlp.fc.weight", partial(_half, which=0)),
            "mlp.up.weight": Part("mlp.fc.weight", partial(_half, which=1)),
            "mlp.down.weight": Part("mlp.proj.weight"),
        }
    return {ours + name: Part(theirs + part.source, part.change) for name, part in parts.items()}


def refuse_misfits(model: PublishedModel, parts: Mapping[str, Part], found: Mapping[str, Tensor], where: Path) -> None:
    """Raises Refusal unless every tensor is used, every parameter has one, and each has the shape the configuration gives it."""
    wanted = {part.source for part in parts.values()}
    left = found.keys() - wanted - {TABLE} - ({HEAD} if model.architecture.model.tied_embeddings else set())
    for kind, names in (("lacks", wanted - found.keys()), ("has a tensor that nothing in its configuration uses:", left)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refusal(
                f"{where} {kind} {min(names)}{more}. Weights and configuration are not of one model: copy both again from its source."
            )
    for name, like in parameters_of(model.architecture).items():
        part, tensor = parts[name], found[parts[name].source]
        if not tensor.is_floating_point():
            raise Refusal(
                f"{where} has {part.source} as {tensor.dtype}: weights are floating-point numbers. Copy it again from its source."
            )
        if _shape_after(part, tensor) != like.shape:
            raise Refusal(
                f"{where} has {part.source} in the shape {tuple(tensor.shape)}, which does not make the {tuple(like.shape)} that its "
                f"configuration asks for ({name} here). Weights and configuration are not of one model: copy both again from its source."
            )


def _shape_after(part: Part, tensor: Tensor) -> torch.Size | None:
    try:
        return part.change(torch.empty(tensor.shape, device="meta")).shape
    except (RuntimeError, IndexError):  # a shape that cannot be changed so
        return None


def with_base(model: PublishedModel, base: float) -> PublishedModel:
    """The model with another rotary base."""
    architecture = model.architecture
    return replace(model, architecture=replace(architecture, model=replace(architecture.model, rope_base=base)))


def rotary_base(table: Tensor, stated: float, head_dim: int, where: Path) -> float:
    """The base of a stored table of angles [1, positions, 1, head_dim / 2, 2]: the stated one, or the whole number it was computed with.

    The published forward reads the table, and the published tools drop the stated base on the way: so the table decides. Raises Refusal
    for a table of other angles.
    """
    if table.dim() != 5 or (table.shape[0], *table.shape[2:]) != (1, 1, head_dim // 2, 2):
        raise Refusal(f"{where} has {TABLE} in the shape {tuple(table.shape)}: no table of angles of heads with {head_dim} channels.")
    angles = table[0, :, 0].float()
    tolerance = _CLOSE + torch.finfo(table.dtype).eps
    if _is_table(angles, stated, head_dim, tolerance):
        return stated
    pair = head_dim // 4
    if pair and len(angles) > 1:
        angle = torch.atan2(angles[1, pair, 1], angles[1, pair, 0]).item()  # base^(-2 pair / head_dim)
        base = float(round(angle ** (-head_dim / (2 * pair)))) if angle > 0 else 0.0
        if base > 1 and _is_table(angles, base, head_dim, tolerance):
            return base
    raise Refusal(
        f"{where} has a rotary table ({TABLE}) that is neither of the base {stated:g} its configuration states nor of another one: "
        f"positions may be condensed, which the models here lack. It is not imported."
    )


def _is_table(angles: Tensor, base: float, head_dim: int, tolerance: float) -> bool:
    cos, sin = rotary_tables(len(angles), head_dim, base, torch.device("cpu"))
    return bool(((angles[..., 0] - cos).abs().amax() < tolerance) & ((angles[..., 1] - sin).abs().amax() < tolerance))
