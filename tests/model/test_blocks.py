"""Rotary positions, attention, MLPs, gates, blocks and the attractor's injections against formulas written out naively in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import Attention, Context, ValueGate, make_context
from model.attractor import Attractor
from model.backbone import Backbone
from model.block import Block
from model.config import AttractorConfig, BackboneConfig
from model.layers import MLP, ChannelGate, PlainLayers, RMSNorm
from model.rotary import rotary_tables, rotate

CPU = torch.device("cpu")
LENGTH = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backbone_config(**fields: Any) -> BackboneConfig:
    return BackboneConfig(**{"vocabulary_size": 11, "width": 16, "heads": 4, "backbone_layers": 2, "value_gate_channels": 8, **fields})


def filled(module: torch.nn.Module, seed: int = 0) -> Any:
    """The module in float64 with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator) + (parameter.ndim == 1))
    return module.requires_grad_(False)


def naive_norm(x: Tensor, gain: Tensor | float = 1.0, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def naive_rotate(x: Tensor, base: float) -> Tensor:
    """Pairs (i, i + d/2) of x [s, d] as complex numbers, turned by exp(i position base^(-2i/d))."""
    length, dim = x.shape
    pairs = torch.complex(x[:, : dim // 2], x[:, dim // 2 :])
    angles = torch.tensor([[position * base ** (-2 * i / dim) for i in range(dim // 2)] for position in range(length)], dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_attention(
    module: Any, config: BackboneConfig, x: Tensor, memory: Tensor, allowed: Tensor, values: Tensor | None = None
) -> Tensor:
    """One sequence x [s, w], head by head and query by query; allowed [s, s]."""
    dim, group = config.head_dim, config.heads // config.key_value_heads
    q, k, v = (projection.weight @ source.T for projection, source in ((module.query, x), (module.key, memory), (module.value, memory)))
    mixed = torch.zeros(x.shape[0], config.heads * dim, dtype=torch.float64)
    for head in range(config.heads):
        kv = head // group
        query = naive_rotate(q[head * dim : (head + 1) * dim].T, config.rope_base)
        key = naive_rotate(k[kv * dim : (kv + 1) * dim].T, config.rope_base)
        value = v[kv * dim : (kv + 1) * dim].T
        if config.qk_norm:
            query, key = naive_norm(query), naive_norm(key)
        if values is not None:
            gate = 2 / (1 + torch.exp(-(x[:, : config.value_gate_channels] @ module.value_gate.projection.weight[kv])))
            value = value + gate[:, None] * values[:, kv * dim : (kv + 1) * dim]
        for i in range(x.shape[0]):
            scores = (key @ query[i] / math.sqrt(dim)).where(allowed[i], -math.inf)
            weights = torch.exp(scores - scores.max())
            mixed[i, head * dim : (head + 1) * dim] = (weights / weights.sum()) @ value
    return mixed @ module.out.weight.T


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
# rotary tables are fp32 by design: angles rounded to 6e-8 of their cosine, the rest is float64
TABLES: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_equals_a_naive_one(qk_norm: bool, kv_heads: int | None, documents: bool) -> None:
    config = backbone_config(qk_norm=qk_norm, kv_heads=kv_heads)
    module, x = filled(Attention(config, PlainLayers())), normal(2, LENGTH, 16)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 5, 5, 5, 5, 5, 5]]) if documents else None
    got = module(x, make_context(config, torch.zeros(2, LENGTH), numbers))
    for row in range(2):
        allowed = CAUSAL if numbers is None else CAUSAL & (numbers[row][:, None] == numbers[row][None])
        torch.testing.assert_close(got[row], naive_attention(module, config, x[row], x[row], allowed), **TABLES)


def test_attention_reads_keys_and_values_from_memory() -> None:
    config = backbone_config(kv_heads=2)
    module, x, memory = filled(Attention(config, PlainLayers())), normal(1, LENGTH, 16), normal(1, LENGTH, 16, seed=1)
    got = module(x, make_context(config, torch.zeros(1, LENGTH), None), memory)
    torch.testing.assert_close(got[0], naive_attention(module, config, x[0], memory[0], CAUSAL), **TABLES)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_value_embeddings_enter_through_their_gate(kv_heads: int | None) -> None:
    config = backbone_config(kv_heads=kv_heads, value_embeddings=True)
    module, x = filled(Attention(config, PlainLayers(), value_embedding=True)), normal(1, LENGTH, 16)
    values = normal(1, LENGTH, config.key_value_heads * config.head_dim, seed=2)
    context = make_context(config, torch.zeros(1, LENGTH), None)
    want = naive_attention(module, config, x[0], x[0], CAUSAL, values[0])
    torch.testing.assert_close(module(x, context, None, values)[0], want, **TABLES)
    module.value_gate.projection.weight.zero_()
    torch.testing.assert_close(ValueGate.forward(module.value_gate, x), torch.ones(1, LENGTH, config.key_value_heads, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(offset=st.integers(0, 40), distance=st.integers(0, 20), seed=st.integers(0, 99), head_dim=st.sampled_from([2, 8, 64]))
def test_rotary_scores_depend_on_distance_alone(offset: int, distance: int, seed: int, head_dim: int) -> None:
    cos, sin = rotary_tables(64, head_dim, 10_000.0, CPU)
    q, k = normal(head_dim, seed=seed), normal(head_dim, seed=seed + 1)

    def score(at: int) -> float:
        x = torch.zeros(1, 64, 2, head_dim, dtype=torch.float64)
        x[0, at + distance, 0], x[0, at, 1] = q, k
        turned = rotate(x, cos, sin)
        return float(turned[0, at + distance, 0] @ turned[0, at, 1])

    # fp32 tables: 64 products of numbers of order one, each off by at most 1e-7
    assert score(offset) == pytest.approx(score(0), abs=2e-6 * head_dim**0.5 * float(q.norm() * k.norm()))


def test_rotary_equals_complex_rotation_and_keeps_norms() -> None:
    x = normal(2, 50, 3, 8)
    turned = rotate(x, *rotary_tables(50, 8, 500.0, CPU))
    torch.testing.assert_close(turned[1, :, 2], naive_rotate(x[1, :, 2], 500.0), **TABLES)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_rotary_keeps_precision_far_out() -> None:
    # position 2^17 - 1 in fp32 angles would be off by 0.01; the table is made in float64 and rounded once
    cos, sin = rotary_tables(1 << 17, 4, 10_000.0, CPU)
    position = (1 << 17) - 1
    assert float(cos[-1, 0]) == pytest.approx(math.cos(position), abs=1e-7)
    assert float(sin[-1, 1]) == pytest.approx(math.sin(position / 100), abs=1e-7)


def test_rotation_under_bf16_errs_by_a_few_roundings() -> None:
    x = normal(1, 512, 2, 64).to(torch.bfloat16)
    tables = rotary_tables(512, 64, 10_000.0, CPU)
    exact = rotate(x.double(), *tables)
    error = (rotate(x, *tables).double() - exact).norm() / exact.norm()
    once = (exact.to(torch.bfloat16).double() - exact).norm() / exact.norm()
    assert error < 2 * once  # cosine, products and their sum, each rounded: sqrt(3) of one rounding


def test_rotary_tables_survive_a_fake_tensor_pass() -> None:
    # tracing for shapes must leave nothing in the cache that a later real pass would compute with
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        rotary_tables(61, 8, 77.0, CPU)
    assert not any(isinstance(table, FakeTensor) for table in rotary_tables(61, 8, 77.0, CPU))


def test_mlps_equal_their_formulas() -> None:
    x = normal(3, 16)
    relu2 = filled(MLP(backbone_config(mlp="relu2"), PlainLayers()))
    want = (x @ relu2.up.weight.T).clamp_min(0) ** 2 @ relu2.down.weight.T
    torch.testing.assert_close(relu2(x), want)
    swiglu = filled(MLP(backbone_config(mlp="swiglu", mlp_width=24), PlainLayers()))
    gate = x @ swiglu.gate.weight.T
    want = (gate / (1 + torch.exp(-gate)) * (x @ swiglu.up.weight.T)) @ swiglu.down.weight.T
    torch.testing.assert_close(swiglu(x), want)
    assert swiglu.up.weight.shape == (24, 16)


def test_rms_norm_is_its_formula_and_returns_the_gains_precision() -> None:
    norm, x = filled(RMSNorm(16, 1e-2, PlainLayers())), normal(3, 16)
    torch.testing.assert_close(norm(x), naive_norm(x, norm.weight, 1e-2))
    norm.bfloat16()
    assert norm(x.float()).dtype == torch.bfloat16
    # computed in x's precision, rounded once: within half a unit in the last place of bf16
    torch.testing.assert_close(norm(x.float()).double(), naive_norm(x.float().double(), norm.weight.double(), 1e-2), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("initial", "maximum"), [(0.5, 0.75), (0.75, 0.75), (0.1, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_start_where_told_and_stay_below_their_maximum(initial: float, maximum: float, dtype: torch.dtype) -> None:
    gate = ChannelGate(16, initial, maximum, PlainLayers()).to(dtype)
    assert gate.raw.shape == (16,)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7  # the sigmoid's argument and its result, each rounded
    assert torch.allclose(gate(torch.ones(2, 16, dtype=dtype)).float(), torch.full((2, 16), initial), rtol=rounding)
    with torch.no_grad():
        gate.raw.fill_(100.0)
    assert torch.allclose(gate(torch.ones(2, 16, dtype=dtype)).float(), torch.full((2, 16), maximum), rtol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saturated_gate_still_gets_a_gradient(dtype: torch.dtype) -> None:
    # the published 140M model starts its gates at their maximum: a sigmoid rounded to 1 would keep them there for ever
    gate = ChannelGate(16, 0.75, 0.75, PlainLayers()).to(dtype)
    gate(torch.ones(1, 16, dtype=dtype)).sum().backward()
    assert gate.raw.grad is not None
    assert (gate.raw.grad > 0).all()


def naive_block(block: Block, config: BackboneConfig, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """delta of one sequence x [s, w]: a = gamma_a attention(norm x); a + gamma_m mlp(norm(x + a))."""

    def gamma(gate: Any) -> Tensor | float:
        return gate.maximum / (1 + torch.exp(-gate.raw)) if isinstance(gate, ChannelGate) else 1.0

    first, second = block.attention_norm.weight, block.mlp_norm.weight
    inner = naive_norm(x, first, config.norm_eps)
    read = inner if memory is None else naive_norm(memory, first, config.norm_eps)
    attended = naive_attention(block.attention, config, inner, read, CAUSAL) * gamma(block.attention_gate)
    hidden = (naive_norm(x + attended, second, config.norm_eps) @ block.mlp.up.weight.T).clamp_min(0) ** 2  # type: ignore[operator]
    return attended + hidden @ block.mlp.down.weight.T * gamma(block.mlp_gate)  # type: ignore[operator]


def naive_stack(attractor: Attractor, config: BackboneConfig, h: Tensor, memory: Tensor | None = None) -> Tensor:
    """D(h): what ordinary residual blocks add to h altogether."""
    x = h
    for block in attractor.blocks:
        x = x + naive_block(block, config, x, memory)  # type: ignore[arg-type]
    return x - h


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_injections_equal_their_formulas(layers: int) -> None:
    config = backbone_config(kv_heads=2)
    y, y0 = normal(LENGTH, 16, seed=5), normal(LENGTH, 16, seed=6)
    context = make_context(config, torch.zeros(1, LENGTH), None)

    def attractor(injection: str) -> Attractor:
        return filled(Attractor(config, AttractorConfig(layers=layers, injection=injection), PlainLayers()))  # type: ignore[arg-type]

    def check(module: Attractor, want: Tensor) -> None:
        torch.testing.assert_close(module(y[None], y0[None], context)[0], want, rtol=1e-5, atol=1e-5)  # the tables', through the layers

    additive = attractor("additive")
    check(additive, y0 + naive_stack(additive, config, y + y0))
    published = y + y0 + naive_stack(additive, config, y + y0) - y  # Head(y + y0) - y
    check(additive, published)
    concat = attractor("concat")
    assert concat.merge is not None
    merge: Tensor = concat.merge.weight  # type: ignore[assignment]
    check(concat, y0 + naive_stack(concat, config, y @ merge[:, :16].T + y0 @ merge[:, 16:].T))
    init_only = attractor("init_only")
    check(init_only, y + naive_stack(init_only, config, y))
    cross = attractor("cross_attention")
    check(cross, y0 + naive_stack(cross, config, y, memory=y0))


def test_published_form_loses_digits_that_ours_keeps() -> None:
    # Head(y + y0) - y in fp32 with a large state: the reason for working with the increment
    config = backbone_config()
    module = filled(Attractor(config, AttractorConfig(), PlainLayers()))
    y, y0 = 1e4 * normal(1, LENGTH, 16, seed=5), normal(1, LENGTH, 16, seed=6)
    context = make_context(config, torch.zeros(1, LENGTH), None)
    exact = module(y, y0, context)
    single = module.float()
    y, y0 = y.float(), y0.float()
    ours = (single(y, y0, context) - exact).norm()
    theirs = ((y + y0 + single.increment(y + y0, None, context)) - y - exact).norm()
    assert ours < 0.1 * theirs


@pytest.mark.parametrize("recompute", [False, True])
def test_backbone_is_its_blocks_one_after_another(recompute: bool) -> None:
    config = backbone_config(backbone_layers=3, value_embeddings=True)
    module = filled(Backbone(config, PlainLayers(), range(config.backbone_layers), recompute))
    tokens = torch.randint(0, 11, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    context: Context = make_context(config, tokens, None)
    x = normal(1, LENGTH, 16)
    want = x[0]
    assert sorted(module.value_embeddings) == ["0", "2"]  # every other block, the last included
    for layer, block in enumerate(module.blocks):
        values = module.value_embeddings[str(layer)].weight[tokens[0]] if layer != 1 else None
        first, second = block.attention_norm.weight, block.mlp_norm.weight
        want = want + naive_attention(block.attention, config, normed := naive_norm(want, first, 1e-5), normed, CAUSAL, values)
        want = want + (naive_norm(want, second, 1e-5) @ block.mlp.up.weight.T).clamp_min(0) ** 2 @ block.mlp.down.weight.T
    torch.testing.assert_close(module(x, context)[0], want, rtol=1e-5, atol=1e-5)  # fp32 tables, through three layers


def test_recomputation_of_the_backbone_changes_no_bit() -> None:
    config = backbone_config(value_embeddings=True)
    tokens = torch.randint(0, 11, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        module = filled(Backbone(config, PlainLayers(), range(config.backbone_layers), recompute)).requires_grad_()
        module(normal(2, LENGTH, 16), make_context(config, tokens, None)).sin().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_context_rows_follow_the_batch() -> None:
    config = backbone_config()
    documents = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 2]])
    context = make_context(config, torch.zeros(3, 3), documents)
    rows = torch.tensor([2, 0])
    assert context.mask is not None
    picked = context.rows(rows)
    assert picked.mask is not None
    assert torch.equal(picked.mask, context.mask[rows])
    assert make_context(config, torch.zeros(3, 3), None).rows(rows).mask is None
    assert context.mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
