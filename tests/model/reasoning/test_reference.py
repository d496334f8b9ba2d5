"""TRM and HRM against plain references written from the formulas: the numbers, and the gradients of a supervision step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.reasoning.config import ReasoningConfig
from model.reasoning.loss import stablemax_cross_entropy
from model.reasoning.reasoner import Reasoner, build
from model.reasoning.supervision import supervise
from tests.model.reasoning.support import CELLS, MLP, begun, grids, lively, reasoning

ROWS = 3
CASES: dict[str, dict[str, Any]] = {
    "attention": {"kind": "trm", "inner_cycles": 2},
    "no positions": {"kind": "trm", "outer_cycles": 1, "inner_cycles": 3, "positions": "none"},
    "learned positions": {"kind": "trm", "inner_cycles": 1, "positions": "learned", "prefix": 0},
    "mlp": {"kind": "trm", "inner_cycles": 2, **MLP},
    "partial steps": {"kind": "trm", "inner_cycles": 2, "step_size": 0.7},
    "hrm": {"kind": "hrm", "outer_cycles": 2, "inner_cycles": 2},
    "hrm one cycle": {"kind": "hrm", "outer_cycles": 1, "inner_cycles": 1},
}


def norm(h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attention(h: Tensor, p: dict[str, Tensor], heads: int, rope: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (h @ p["attention.qkv.weight"].T).chunk(3, -1))
    half = q.shape[-1] // 2
    angle = torch.arange(h.shape[1])[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle), angle if rope else 0 * angle)

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), -1)

    scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(2 * half)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p["attention.out.weight"].T


def swiglu(h: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (h @ gate_up.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ down.T


def network(model: Reasoner, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    m, parameters = model.config.model, dict(model.named_parameters())

    def apply(state: Tensor, injection: Tensor) -> Tensor:
        h = state + injection
        for layer in range(m.layers):
            start = f"core.{name}.blocks.{layer}."
            p = {key.removeprefix(start): value for key, value in parameters.items() if key.startswith(start)}
            if m.mixing == "attention":
                h = norm(h + attention(h, p, m.heads, m.positions == "rope"))
            else:
                mixed = h.transpose(1, 2)
                h = norm(mixed + swiglu(mixed, p["mixing.gate_up.weight"], p["mixing.down.weight"])).transpose(1, 2)
            h = norm(h + swiglu(h, p["mlp.gate_up.weight"], p["mlp.down.weight"]))
        return (1 - m.step_size) * state + m.step_size * h

    return apply


def reference(model: Reasoner, y: Tensor, z: Tensor, inputs: Tensor, identifiers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, logits, halting logits) of a supervision step."""
    m = model.config.model
    x = model.embedding.weight[inputs.long()]
    if m.prefix:
        first = model.puzzle_embedding.weight[identifiers][:, None]  # type: ignore[union-attr]
        x = torch.cat((first, torch.zeros(len(x), m.prefix - 1, m.width, dtype=x.dtype), x), 1)
    if model.positions is not None:
        x = (x + model.positions.weight) / math.sqrt(2)
    x = x * math.sqrt(m.width)
    low, high = (network(model, name) for name in (("low", "high") if m.kind == "hrm" else ("network", "network")))
    for cycle in range(m.outer_cycles):
        for inner in range(m.inner_cycles):
            if m.kind == "hrm" or inner == 0:  # hrm: only the last update of each network; trm: the whole last cycle
                y, z = y.detach(), z.detach()
            z = low(z, y + x)
        y = high(y.detach() if m.kind == "hrm" and cycle + 1 < m.outer_cycles else y, z)
    return y, z, (y @ model.head.weight.T)[:, m.prefix :], y[:, 0] @ model.halting.weight.T + model.halting.bias


def settings(case: str) -> ReasoningConfig:
    return reasoning(**CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_formulas(case: str) -> None:
    model, inputs = lively(settings(case)), grids(ROWS)
    identifiers = torch.zeros(ROWS, dtype=torch.int64)
    latents = model.start(ROWS)
    for _ in range(2):  # the second starts from what the first carries
        thought = model(latents, inputs, identifiers)
        y, z, logits, q = reference(model, *latents, inputs, identifiers)
        for got, want in zip(
            (*thought.latents, thought.logits, thought.q_halt, thought.q_continue), (y, z, logits, q[:, 0], q[:, 1]), strict=True
        ):
            torch.testing.assert_close(got, want.to(got.dtype), rtol=2e-6, atol=2e-6)  # rotary tables are fp32
        change = sum((new - old).square().sum((1, 2)) for new, old in zip((y, z), latents, strict=True))
        size = sum(new.square().sum((1, 2)) for new in (y, z))
        torch.testing.assert_close(thought.residual, (change / size).sqrt().float(), rtol=1e-5, atol=0)  # type: ignore[union-attr]
        latents = thought.latents


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_supervision_step_is_autograds(case: str) -> None:
    config = settings(case)
    model, answers = lively(config), grids(ROWS, seed=1)
    carry = begun(model, grids(ROWS), answers)
    supervise(model, carry, config.supervision, carry.steps).loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    _, _, logits, q = reference(model, *carry.latents, carry.inputs, carry.identifiers)
    exact = (logits.argmax(-1) == answers).all(-1).to(q.dtype)
    loss = stablemax_cross_entropy(logits, answers).mean() + 0.5 * F.binary_cross_entropy_with_logits(q[:, 0], exact)
    names = list(got)
    for name, want in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        gradient = got[name]
        assert gradient is not None
        torch.testing.assert_close(
            gradient, want, rtol=1e-4, atol=1e-7 * float(want.abs().max() + 1), msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_bf16_model_computes_in_bf16_near_the_fp32_one() -> None:
    config, inputs, identifiers = settings("attention"), grids(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    exact, rounded = build(config), build(config, dtype=torch.bfloat16)
    want, got = exact(exact.start(ROWS), inputs, identifiers), rounded(rounded.start(ROWS), inputs, identifiers)
    assert {latent.dtype for latent in got.latents} == {got.logits.dtype} == {torch.bfloat16}
    assert got.q_halt.dtype == got.residual.dtype == torch.float32
    assert got.logits.shape == (ROWS, CELLS, 6)
    # eps = 2^-8 a rounding; nine applications of two blocks of a random network grow it by an order of magnitude
    assert float((got.logits.float() - want.logits).detach().norm() / want.logits.detach().norm()) < 0.15
