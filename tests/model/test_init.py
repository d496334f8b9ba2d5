"""First weights: their spreads, what is zero and what must not be, and that a seed and a name decide each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.init import standard_deviation
from model.language_model import LanguageModel, build
from tests.model.support import configuration, random_tokens

MODEL = {"vocabulary_size": 512, "width": 128, "heads": 4, "backbone_layers": 2, "value_embeddings": True}


def model_with(seed: int = 0, attractor: dict[str, Any] | None = None, **backbone: Any) -> LanguageModel:
    return build(configuration(model={**MODEL, **backbone}, attractor=attractor or {}), seed=seed)


@pytest.mark.parametrize("zero_output_init", [True, False])
def test_spreads_are_those_of_the_table(zero_output_init: bool) -> None:
    common = math.sqrt(2 / (5 * 128))
    model = model_with(zero_output_init=zero_output_init, mlp="swiglu", tied_embeddings=False, attractor={"injection": "concat"})
    seen: dict[str, int] = {"common": 0, "output": 0, "gate": 0}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        if "value_gate" in name:
            assert (parameter == 0).all()
            seen["gate"] += 1
            continue
        output = name.startswith("backbone.") and name.endswith(("attention.out.weight", "mlp.down.weight"))
        want = (0.0 if zero_output_init else common / 2) if output else common  # sqrt(2 * 2 layers) = 2
        seen["output" if output else "common"] += 1
        if want == 0:
            assert (parameter == 0).all(), name
            continue
        # cut at three deviations: the spread is 0.9866 of the nominal, sampled from at least 16,384 numbers (0.6 %)
        assert float(parameter.detach().std()) == pytest.approx(0.9866 * want, rel=0.03), name
        assert abs(float(parameter.detach().mean())) < 0.03 * want, name
        assert float(parameter.detach().abs().max()) <= 3 * want * (1 + 1e-6), name
    assert seen == {"common": 2 * 5 + 7 + 1 + 1 + 2, "output": 4, "gate": 1}  # backbone, block of the map, merge, table, embeddings
    assert standard_deviation(model.config.model) == common


def test_vectors_start_at_their_configured_values() -> None:
    model = model_with(attractor={"gate_initial": 0.3, "gate_maximum": 0.9})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "gate" in name:
            torch.testing.assert_close(0.9 * torch.sigmoid(parameter.detach()), torch.full((128,), 0.3))
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name


def test_the_first_proposal_is_the_embedding_and_the_map_is_not_constant() -> None:
    model, tokens = model_with(value_embeddings=False), random_tokens(2, 8, 512)
    proposal, context = model.propose(tokens, None)
    assert torch.equal(proposal, model.embedding(tokens))
    assert model.refine is not None
    attractor = model.refine.attractor
    assert not torch.allclose(attractor(proposal, proposal, context), attractor(0 * proposal, proposal, context))


def test_every_gate_and_matrix_of_the_map_gets_a_gradient_at_the_start() -> None:
    model, tokens = model_with(), random_tokens(2, 8, 512)
    model(tokens, random_tokens(2, 8, 512, seed=1))[0].backward()
    assert model.refine is not None
    for name, parameter in model.refine.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_seed_and_name_decide_a_parameter_alone() -> None:
    one, again, other = (dict(model_with(seed).named_parameters()) for seed in (3, 3, 4))
    for name, parameter in one.items():
        assert torch.equal(parameter, again[name])
        if parameter.ndim == 2 and parameter.abs().sum() > 0:
            assert not torch.equal(parameter, other[name]), name
    # another depth, another injection, another state of the global generator: the shared names keep their numbers
    torch.manual_seed(99)
    deeper = dict(model_with(3, attractor={"layers": 2, "injection": "concat"}, tied_embeddings=False).named_parameters())
    assert all(torch.equal(parameter, deeper[name]) for name, parameter in one.items())
    matrices = [p for p in one.values() if p.shape == (128, 128) and p.abs().sum() > 0]
    assert len(matrices) > 4
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


def test_building_leaves_the_global_generator_alone_in_its_results() -> None:
    torch.manual_seed(1)
    first = model_with(5).embedding.weight
    torch.manual_seed(2)
    assert torch.equal(first, model_with(5).embedding.weight)  # type: ignore[arg-type]


def test_bf16_is_the_rounded_fp32_model() -> None:
    config = configuration(model=MODEL)
    single, half = build(config, seed=1), build(config, seed=1, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(single.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**40])
def test_any_seed_is_accepted(seed: int) -> None:
    assert model_with(seed).embedding.weight.isfinite().all()  # type: ignore[operator]
