"""Deep equilibrium models: the hidden state against a long plain iteration, its gradients against autograd through that iteration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import Context
from model.config import ModelConfig
from model.equilibrium import Equilibrium
from model.language_model import LanguageModel, build
from model.noise import normal, seeds_of
from model.refine import Refine
from tests.model.support import configuration, random_tokens

LENGTH = 6


def deq(mode: str = "one_step", **sections: dict[str, object]) -> ModelConfig:
    base = {
        "model": {"kind": "deq", "zero_output_init": False, "backbone_layers": 1},
        "solver": {"tolerance": 1e-13, "max_iterations": 400, "patience": 400},
        "gradient": {"mode": mode},
    }
    return configuration(**{name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}})  # type: ignore[arg-type]


def parts(config: ModelConfig) -> tuple[LanguageModel, Refine, Tensor, Context]:
    model = build(config, dtype=torch.float64)
    assert isinstance(model.refine, Refine)
    proposal, context = model.propose(random_tokens(2, LENGTH), None)
    return model, model.refine, proposal, context


def iterated(refine: Refine, x: Tensor, context: Context, count: int = 400) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(count):
        z = refine.attractor(z, x, context)
    return z


def test_the_state_is_hidden_starts_at_zero_and_is_solved_for() -> None:
    _, refine, x, context = parts(deq())
    assert isinstance(refine.attractor, Equilibrium)
    with torch.no_grad():
        refined = refine(x, context)
        torch.testing.assert_close(refined.output, iterated(refine, x, context), rtol=1e-10, atol=1e-10)
        first = refine(x, context, 1).output
        torch.testing.assert_close(first, refine.attractor(torch.zeros_like(x), x, context), rtol=0, atol=0)
        assert torch.equal(refine(x, context, 0).output, torch.zeros_like(x))
    assert refined.distance is None, "there is no proposal to be near to"
    assert refined.solution is not None
    assert refined.solution.converged.all()
    # post-norm: with gains of 1 every token of the state has an rms of 1, whatever the input's scale
    torch.testing.assert_close(refined.output.square().mean(-1), torch.ones(2, LENGTH, dtype=torch.float64), rtol=1e-3, atol=0)


def test_adjoint_gradients_are_autograd_s_through_the_iteration() -> None:
    model, refine, x, context = parts(deq("adjoint"))
    parameters = [*model.backbone.parameters(), *refine.parameters()]
    ours = torch.autograd.grad(refine(x, context).output.sin().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(iterated(refine, x, context).sin().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_one_step_gradients_are_those_of_one_application_at_the_equilibrium() -> None:
    model, refine, x, context = parts(deq())
    parameters = [*model.backbone.parameters(), *refine.parameters()]
    with torch.no_grad():
        point = iterated(refine, x, context)
    ours = torch.autograd.grad(refine(x, context).output.sin().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(refine.attractor(point, x, context).sin().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pure_deq_needs_no_backbone_and_either_head(tied: bool) -> None:
    config = deq(model={"backbone_layers": 0, "tied_embeddings": tied})
    model, tokens = build(config), random_tokens(2, LENGTH)
    loss, record = model(tokens, tokens)
    loss.backward()
    assert (model.head is None) == tied
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert float(record["solver_iterations"]) > 1


def test_sections_that_would_be_ignored_in_silence_are_refused() -> None:
    with pytest.raises(ValueError, match="init_only sees the proposal as the start alone"):
        configuration(attractor={"injection": "init_only"}, solver={"start": "noise"})
    with pytest.raises(ValueError, match="injection=concat is the attractor's: a deq"):
        deq(attractor={"injection": "concat"})


@pytest.mark.parametrize("start", ["zero", "noise", "proposal"])
def test_an_attractor_reaches_the_same_equilibrium_from_any_start(start: str) -> None:
    # a contractive map: small gates
    config = configuration(
        attractor={"gate_initial": 0.05}, solver={"tolerance": 1e-12, "max_iterations": 200, "patience": 200, "start": start}
    )
    _, refine, y0, context = parts(config)
    with torch.no_grad():
        refined = refine(y0, context)
        first = refine(y0, context, 1).output
        begin = {"zero": torch.zeros_like(y0), "noise": normal(seeds_of(context.tokens), LENGTH, 16, 0.025**0.5, y0), "proposal": y0}
        torch.testing.assert_close(first, refine.attractor(begin[start], y0, context), rtol=0, atol=0)
        reference = parts(replace(config, solver=replace(config.solver, start="proposal")))[1](y0, context)
    torch.testing.assert_close(refined.output, reference.output, rtol=1e-9, atol=1e-10)
    assert refined.distance is not None
    torch.testing.assert_close(refined.distance, ((refined.output - y0).flatten(1).norm(dim=1) / y0.flatten(1).norm(dim=1)))
