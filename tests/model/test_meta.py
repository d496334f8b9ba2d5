"""The published 140M models on the meta device: sizes of the reference table, and a forward pass that assumes no device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig, SolverConfig
from model.cost import count_parameters, flops
from model.language_model import LanguageModel, build

VOCABULARY, LENGTH = 32_768, 2_048
ATTRACTOR = ModelConfig(
    model=BackboneConfig(vocabulary_size=VOCABULARY, width=1024, heads=8, backbone_layers=7),
    attractor=AttractorConfig(layers=1),
    solver=SolverConfig(min_iterations=6, max_iterations=6),
    gradient=GradientConfig(mode="neumann"),
)
TRANSFORMER = ModelConfig(
    model=BackboneConfig(kind="transformer", vocabulary_size=VOCABULARY, width=768, heads=6, backbone_layers=6, value_embeddings=True)
)


@pytest.mark.parametrize(
    ("config", "total", "matmul", "tables"),
    [(ATTRACTOR, 134e6, 101e6, 0), (TRANSFORMER, 143e6, 42e6, 75e6)],
    ids=["attractor-140m", "transformer-140m"],
)
def test_published_sizes(config: ModelConfig, total: float, matmul: float, tables: float) -> None:
    model, count = build(config, device="meta", dtype=torch.bfloat16), count_parameters(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total == pytest.approx(total, rel=0.01)
    assert count.matmul == pytest.approx(matmul, abs=0.5e6)  # published in whole millions
    assert count.value_embedding == pytest.approx(tables, rel=0.01)


@pytest.mark.parametrize(
    ("config", "evaluations", "gigaflops"),
    [(TRANSFORMER, 0, 0.46), (ATTRACTOR, 1, 0.94), (ATTRACTOR, 6, 1.08)],
    ids=["transformer", "attractor-1", "attractor-6"],
)
def test_published_flops(config: ModelConfig, evaluations: int, gigaflops: float) -> None:
    # the published figures count the causal half of attention and a one-step gradient; ours count the square the kernels do
    m = config.model
    attended = 3 * m.backbone_layers + ((evaluations + 3) if m.kind == "attractor" else 0)  # forward passes, backward being two
    half = attended * 4 * LENGTH * m.width / 2
    ours = flops(replace(config, gradient=GradientConfig()), LENGTH, evaluations).model - half
    assert ours == pytest.approx(gigaflops * 1e9, abs=0.005e9)  # two digits behind the point


def meta_tokens(batch: int) -> Tensor:
    return torch.zeros(batch, LENGTH, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("config", [ATTRACTOR, TRANSFORMER], ids=["attractor", "transformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_a_training_step_traces_without_a_device(config: ModelConfig, dtype: torch.dtype, documents: bool) -> None:
    model, tokens = build(config, device="meta", dtype=dtype), meta_tokens(2)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in model.parameters())
    loss, record = model(tokens, tokens, tokens.int() if documents else None)
    loss.backward()
    assert loss.is_meta
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in model.parameters())
    # everything of the record lives where the model does; products are counted on the host by design
    assert all(value.is_meta for key, value in record.items() if key != "products")


@pytest.mark.parametrize("mode", ["one_step", "neumann", "phantom"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_fixed_gradient_traces(mode: Any, recompute: bool) -> None:
    config = replace(ATTRACTOR, gradient=GradientConfig(mode=mode, steps=2), model=replace(ATTRACTOR.model, backbone_layers=1))
    model = build(config, device="meta", recompute=recompute)
    model(meta_tokens(1), meta_tokens(1))[0].backward()


def test_evaluation_at_fixed_depths_traces() -> None:
    model = build(ATTRACTOR, device="meta")
    _, record = model(meta_tokens(1), meta_tokens(1), depths=[0, 1, 4])
    assert record["nll/4"].shape == (1, LENGTH)
    assert model.logits(meta_tokens(1), depth=2).shape == (1, LENGTH, VOCABULARY)


def test_the_map_is_one_graph() -> None:
    # no branch on a value, no Python side effect: what torch.compile and export need
    model: LanguageModel = build(ATTRACTOR, device="meta")
    assert model.refine is not None
    attractor = model.refine.attractor
    _, context = model.propose(meta_tokens(1), None)
    y = torch.zeros(1, LENGTH, 1024, device="meta")
    graph = make_fx(lambda a, b: attractor(a, b, context))(y, y)
    assert any("scaled_dot_product" in str(node.target) or "bmm" in str(node.target) for node in graph.graph.nodes)
    assert graph(y, y).shape == y.shape
