"""Building: the meta device, what a seed decides, published first values, roles, fixed starts, compiled networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from model.reasoning.reasoner import Reasoner, build
from model.reasoning.roles import parameter_roles
from model.reasoning.supervision import empty_carry, explore, refill, supervise
from model.roles import Role
from tests.model.reasoning.support import CELLS, KINDS, begun, grids, of_kind, reasoning

ROWS = 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_supervision_step_traces_without_a_device(kind: str, dtype: torch.dtype) -> None:
    # on the meta device any read by the host raises: halting, exploration and a solver of a fixed count need none
    config = of_kind(kind)
    model = build(config, device="meta", dtype=dtype)
    empty = torch.zeros(ROWS, CELLS, dtype=torch.uint8, device="meta")
    carry = empty_carry(model.start(ROWS), CELLS)
    carry = refill(carry, empty, empty, carry.identifiers, model.start(ROWS))
    done = supervise(model, carry, config.supervision, explore(torch.rand(2, ROWS, device="meta"), config.supervision))
    done.loss.backward()
    assert done.loss.is_meta
    assert done.loss.dtype == torch.float32
    assert {latent.dtype for latent in done.carry.latents} == {dtype}
    assert all(value.is_meta for value in done.record.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_seed_decides_all_weights() -> None:
    config = reasoning(kind="hrm")
    first, again, other = build(config, seed=3), build(config, seed=3), build(config, seed=4)
    torch.manual_seed(99)
    late = build(config, seed=3)
    for name, parameter in first.named_parameters():
        assert parameter.equal(again.get_parameter(name))
        assert parameter.equal(late.get_parameter(name))
        if name not in ("halting.weight", "halting.bias", "puzzle_embedding.weight"):
            assert not parameter.equal(other.get_parameter(name))
    low, high = (first.get_parameter(f"core.{name}.blocks.0.mlp.down.weight") for name in ("low", "high"))
    assert not low.equal(high)


def test_first_values_are_the_published_ones() -> None:
    model = build(reasoning(kind="trm", width=256, mlp_width=384, vocabulary_size=64, positions="learned", cells=100, heads=4))
    for name, parameter in model.named_parameters():
        if name.startswith("core.") or name in ("embedding.weight", "positions.weight", "head.weight"):
            std = 1 / math.sqrt(parameter.shape[-1])
            assert float(parameter.std().detach()) == pytest.approx(std, rel=0.03), name  # 16,384 numbers: 0.6 % is a deviation
            assert float(parameter.abs().max().detach()) <= 2.28 * std  # two of the normal that was cut, which was 1.137 times wider
    assert not model.halting.weight.any()
    assert model.puzzle_embedding is not None
    assert not model.puzzle_embedding.weight.any()
    assert model.halting.bias.tolist() == [-5, -5]


def test_parameters_are_the_whole_state() -> None:
    model = build(reasoning(kind="attractor"))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())


def test_a_fixed_start_is_always_the_same() -> None:
    for kind in ("trm", "hrm", "attractor"):
        model, other = (build(reasoning(kind=kind), seed=seed) for seed in (0, 1))
        y, z = model.start(3)
        assert y.shape == z.shape == (3, CELLS + 2, 32)
        assert all(a.equal(b) for a, b in zip((y, z), other.start(3), strict=True))
        assert y.equal(y[:1, :1].expand_as(y))
        assert not y.equal(z)
        assert float(torch.cat((y[0, 0], z[0, 0])).std()) == pytest.approx(1, abs=0.3)


def test_a_transformer_carries_nothing() -> None:
    model = build(of_kind("transformer"))
    thought = model(model.start(3), grids(3), torch.zeros(3, dtype=torch.int64))
    assert [latent.numel() for latent in thought.latents] == [0]
    assert thought.residual.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_roles(kind: str) -> None:
    model = build(of_kind(kind, **({"positions": "learned"} if kind == "trm-mlp" else {})), device="meta")
    inside = Role.ATTRACTOR_MATRIX if model.config.model.solves else Role.BACKBONE_MATRIX
    outside = {
        "embedding.weight": Role.EMBEDDING,
        "positions.weight": Role.EMBEDDING,
        "puzzle_embedding.weight": Role.PUZZLE_EMBEDDING,
        "head.weight": Role.HEAD,
        "halting.weight": Role.HEAD,
        "halting.bias": Role.BACKBONE_VECTOR,
    }
    names = [name for name, _ in model.named_parameters()]
    assert parameter_roles(model) == {name: outside.get(name, inside) for name in names}
    assert all(name.startswith("core.") for name in names if name not in outside)


def test_the_network_is_one_graph_and_compiled_once_each() -> None:
    model = build(of_kind("hrm"), device="meta")
    state = torch.zeros(1, CELLS + 2, 32, device="meta")
    tables = model._tables(state)
    graph = make_fx(lambda a, b: model.core.low(a, b, tables))(state, state)  # type: ignore[union-attr]
    assert graph(state, state).shape == state.shape
    compiled: list[str] = []
    for name, module in model.named_modules():
        module.compile = lambda name=name: compiled.append(name)  # type: ignore[method-assign, assignment, misc]
    model.compile_maps()
    assert compiled == ["core.low", "core.high"]


def test_different_puzzle_identifiers_are_told_apart() -> None:
    model = build(reasoning(kind="trm", identifiers=3))
    assert model.puzzle_embedding is not None
    torch.nn.init.normal_(model.puzzle_embedding.weight)
    inputs = grids(1).expand(3, -1)
    logits = model(model.start(3), inputs, torch.tensor([0, 1, 1])).logits
    assert not logits[0].allclose(logits[1])
    assert logits[1].allclose(logits[2])


def test_an_unlearnt_model_halts_nothing() -> None:
    config = of_kind("trm")
    model: Reasoner = build(config)
    carry = begun(model, grids(4), grids(4, 1))
    done = supervise(model, carry, config.supervision, torch.zeros(4, dtype=torch.int32))
    assert not done.carry.halted.any()
    assert float(done.record["finished"]) == 0


def test_a_token_s_gradient_is_summed_in_more_than_bf16() -> None:
    # all cells hold the same token; ones added one by one in bf16 end at 256
    model, rows = build(reasoning(kind="trm"), dtype=torch.bfloat16), 4096 // CELLS
    x = model._embed(torch.ones(rows, CELLS, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64))
    assert x.dtype == torch.bfloat16
    x.sum().backward()
    expected = rows * CELLS * math.sqrt(model.config.model.width)
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert gradient[1].float().tolist() == pytest.approx([expected] * len(gradient[1]), rel=1e-2)
