"""Parcae and the looped Transformer: against plain loops written from the equations, sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import BackboneConfig, LoopConfig, ModelConfig
from model.language_model import LanguageModel, build
from model.layers import PlainLayers
from model.looped import DiagonalInjection, Loop
from model.noise import normal, poisson_counts, seeds_of, sequence_seeds
from tests.model.support import random_tokens

BATCH, LENGTH = 4, 8


def config(kind: str, **loop: int | None) -> ModelConfig:
    model = BackboneConfig(
        kind=kind,  # type: ignore[arg-type]
        vocabulary_size=64,
        width=16,
        heads=2,
        backbone_layers=5,
        value_embeddings=kind == "parcae",
        value_gate_channels=4,
        zero_output_init=False,
    )
    return ModelConfig(model, loop=LoopConfig(**{"core": 2, "coda": 1, "iterations": 3, "backprop": 2, **loop}))  # type: ignore[arg-type]


def loop_of(model: LanguageModel) -> Loop:
    assert isinstance(model.refine, Loop)
    return model.refine


def stir(model: LanguageModel) -> LanguageModel:
    """The diagonal away from its first values, so that nothing about it is special."""
    generator = torch.Generator().manual_seed(5)
    injection = loop_of(model).injection
    if injection is not None:
        with torch.no_grad():
            for parameter in (injection.decay_log, injection.step_bias, injection.input.get_parameter("weight")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def by_hand(model: LanguageModel, tokens: Tensor, counts: list[int]) -> Tensor:
    """What the final norm reads, one sequence at a time, from the equations."""
    outputs = []
    for row, count in zip(tokens, counts, strict=True):
        one, loop, m = row[None], loop_of(model), model.config.model
        proposal, context = model.propose(one, None)
        if m.kind == "looped":
            h, e = torch.zeros_like(proposal), proposal
            for _ in range(count):
                h = loop.core(h + e, context)
        else:
            assert loop.injection is not None
            assert loop.norm is not None
            assert loop.readout is not None
            e, dt = loop.norm(proposal), torch.log1p(torch.exp(loop.injection.step_bias))
            a = torch.exp(-dt * torch.exp(loop.injection.decay_log))
            h = normal(seeds_of(one), LENGTH, m.width, math.sqrt(2 / (5 * m.width)), e)
            for _ in range(count):
                h = loop.core(a * h + dt * (e @ loop.injection.input.get_parameter("weight").T), context)
            h = h @ loop.readout.get_parameter("weight").T
        outputs.append(loop.coda(h, context))
    return torch.cat(outputs)


def drawn(model: LanguageModel, tokens: Tensor) -> list[int]:
    return poisson_counts(sequence_seeds(tokens), model.config.loop.iterations)


@pytest.mark.parametrize(("kind", "depth", "count"), [("parcae", 0, 0), ("parcae", 5, 5), ("parcae", "auto", 3), ("looped", "auto", 3)])
def test_evaluation_takes_the_iterations_asked_for(kind: str, depth: int | str, count: int) -> None:
    model, tokens = stir(build(config(kind), dtype=torch.float64)), random_tokens(BATCH, LENGTH)
    with torch.no_grad():
        refined = loop_of(model)(*model.propose(tokens, None), depth)
        torch.testing.assert_close(refined.output, by_hand(model, tokens, [count] * BATCH), rtol=1e-12, atol=1e-12)
    assert refined.solution is not None
    assert refined.solution.iterations.tolist() == [count] * BATCH


@pytest.mark.parametrize("backprop", [None, 1, 2])
def test_training_takes_each_sequence_s_own_count_and_its_last_gradients(backprop: int | None) -> None:
    model, tokens = stir(build(config("parcae", backprop=backprop), dtype=torch.float64)), random_tokens(BATCH, LENGTH, seed=4)
    counts = drawn(model, tokens)
    assert len(set(counts)) > 2, "all sequences loop equally often: choose other tokens"
    refined = loop_of(model)(*model.propose(tokens, None))
    torch.testing.assert_close(refined.output, by_hand(model, tokens, counts), rtol=1e-12, atol=1e-12)
    assert refined.solution is not None
    assert refined.solution.iterations.tolist() == counts
    kept = [count if backprop is None else min(count, backprop) for count in counts]
    assert refined.applications == sum(kept) / BATCH
    assert refined.solution.evaluations == sum(counts) - sum(kept)


def test_full_backpropagation_is_autograd_s_through_the_plain_loop() -> None:
    for kind in ("parcae", "looped"):
        model, tokens = stir(build(config(kind, backprop=None), dtype=torch.float64)), random_tokens(BATCH, LENGTH, seed=3)
        counts = drawn(model, tokens) if kind == "parcae" else [3] * BATCH
        parameters = list(model.parameters())
        ours = torch.autograd.grad(loop_of(model)(*model.propose(tokens, None)).output.sin().sum(), parameters, allow_unused=True)
        theirs = torch.autograd.grad(by_hand(model, tokens, counts).sin().sum(), parameters, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_truncation_is_exactly_at_the_last_iterations() -> None:
    # with the state before the last two iterations held fixed, autograd through those two is the whole gradient
    model, tokens = stir(build(config("parcae"), dtype=torch.float64)), random_tokens(1, LENGTH, seed=3)
    loop = loop_of(model)
    (count,) = drawn(model, tokens)
    assert count > 2
    injection = loop.injection
    assert injection is not None
    assert loop.norm is not None
    assert loop.readout is not None
    proposal, context = model.propose(tokens, None)
    e = loop.norm(proposal)
    with torch.no_grad():
        h = normal(sequence_seeds(tokens), LENGTH, 16, math.sqrt(2 / 80), e)
        for _ in range(count - 2):
            h = loop.core(injection.decay(h.dtype) * h + injection.drive(e), context)
    for _ in range(2):
        h = loop.core(injection.decay(h.dtype) * h + injection.drive(e), context)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(loop.coda(loop.readout(h), context).sin().sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad(loop(*model.propose(tokens, None)).output.sin().sum(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["parcae", "looped"])
def test_memory_grows_with_iterations_only_as_far_as_gradients_go(kind: str) -> None:
    def saved(iterations: int, backprop: int | None) -> int:
        model = build(config(kind, iterations=iterations, backprop=backprop))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loop_of(model)(*model.propose(random_tokens(1, LENGTH, seed=3), None))
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)

    if kind == "parcae":
        assert saved(40, 2) == saved(20, 2)  # Poisson counts of this sequence are far above 2 in both
        assert saved(40, None) > 1.5 * saved(20, None)
    else:
        assert saved(8, 2) > 1.5 * saved(4, 2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=8),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_injection_contracts_whatever_its_parameters(values: list[tuple[float, float]], dtype: torch.dtype) -> None:
    injection = DiagonalInjection(len(values), PlainLayers())
    with torch.no_grad():
        injection.decay_log.copy_(torch.tensor([first for first, _ in values]))
        injection.step_bias.copy_(torch.tensor([second for _, second in values]))
    decay = injection.decay(dtype)
    assert decay.dtype == dtype
    assert torch.linalg.matrix_norm(torch.diag(decay.double()), 2) < 1
    assert (decay >= 0).all()
    decay.float().sum().backward()
    for parameter in (injection.step_bias, injection.decay_log):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_channel_that_rounds_to_the_bound_still_learns() -> None:
    injection = DiagonalInjection(1, PlainLayers())
    with torch.no_grad():
        injection.step_bias.fill_(-6)  # a = 0.9975, which bf16 rounds to 1
    decay = injection.decay(torch.bfloat16)
    assert float(decay.detach()) == 1 - 2**-8
    decay.float().sum().backward()
    exact = math.log1p(math.exp(-6))
    assert injection.decay_log.grad is not None
    torch.testing.assert_close(float(injection.decay_log.grad), -exact * math.exp(-exact), rtol=1e-2, atol=0)


def test_first_values_are_the_published_ones() -> None:
    injection = loop_of(build(config("parcae"))).injection
    assert injection is not None
    torch.testing.assert_close(injection.decay(torch.float64), torch.full((16,), math.sqrt(0.2), dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(injection.input.get_parameter("weight"), torch.eye(16))
    e = torch.randn(1, 2, 16)
    torch.testing.assert_close(injection.drive(e), -math.log(math.sqrt(0.2)) * e)


def test_counts_have_poisson_s_mean_and_spread() -> None:
    counts = torch.tensor(poisson_counts(sequence_seeds(random_tokens(20_000, 4, vocabulary=4096)), 8), dtype=torch.float64)
    # five standard errors of 20,000 draws: sqrt(8 / 20000) = 0.02 for the mean, sqrt(2) 8 / sqrt(20000) = 0.08 for the variance
    assert abs(float(counts.mean()) - 8) < 0.1
    assert abs(float(counts.var()) - 8) < 0.4
    assert counts.min() >= 1


def test_draws_follow_from_the_tokens_alone() -> None:
    tokens = random_tokens(6, LENGTH)
    seeds = sequence_seeds(tokens)
    assert len(set(seeds)) == 6
    assert sequence_seeds(tokens[[4, 1]]) == [seeds[4], seeds[1]]
    swapped, changed = tokens.clone(), tokens.clone()
    swapped[0, :2] = torch.tensor([1, 2])
    changed[0, :2] = torch.tensor([2, 1])
    assert sequence_seeds(swapped)[0] != sequence_seeds(changed)[0]
    noise = normal(seeds, 3, 1024, 0.5, torch.zeros(()))
    assert torch.equal(normal(seeds[2:3], 3, 1024, 0.5, torch.zeros(())), noise[2:3])
    assert abs(float(noise.std()) - 0.5) < 0.02


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_its_sequences(masked: bool) -> None:
    model, tokens = stir(build(config("parcae"), dtype=torch.float64)), random_tokens(BATCH, LENGTH, seed=4)
    assert len(set(drawn(model, tokens))) > 2, "all sequences loop equally often: nothing is sorted"
    documents = [torch.arange(LENGTH) // (row + 2) if masked else None for row in range(BATCH)]  # another mask for every row
    whole, _ = model(tokens, tokens, torch.stack(documents) if masked else None)  # type: ignore[arg-type]
    parts = [model(row[None], row[None], None if mask is None else mask[None])[0] for row, mask in zip(tokens, documents, strict=True)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["parcae", "looped"])
def test_recomputation_changes_no_gradient(kind: str) -> None:
    gradients = []
    for recompute in (False, True):
        model, tokens = build(config(kind), dtype=torch.float64, recompute=recompute), random_tokens(BATCH, LENGTH, seed=4)
        model(tokens, tokens, tokens % 3)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["parcae", "looped", "deq"])
def test_nothing_later_reaches_earlier_tokens(kind: str) -> None:
    described = config(kind)
    described = replace(described, solver=replace(described.solver, min_iterations=4, max_iterations=4))
    model, tokens = build(described, dtype=torch.float64), random_tokens(2, LENGTH)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 64
    for depth in (1, 4):
        before, after = model.logits(tokens, depth=depth)[:, :5], model.logits(other, depth=depth)[:, :5]
        assert torch.equal(before, after)


def test_the_parts_of_a_loop_must_fit_the_blocks() -> None:
    with pytest.raises(ValueError, match=r"loop\.core=2 with loop\.coda=4 makes 6: raise the former"):
        config("parcae", coda=4)
    assert ModelConfig(BackboneConfig(kind="transformer", backbone_layers=1)).prelude == 1  # nothing loops, nothing to fit


def test_masked_documents_stay_apart_in_the_looped_blocks() -> None:
    model, tokens = build(config("parcae"), dtype=torch.float64), random_tokens(BATCH, LENGTH, seed=3)
    documents = (torch.arange(LENGTH) >= 4).long().expand(BATCH, -1)
    other = tokens.clone()
    other[:, :4] = (other[:, :4] + 1) % 64
    before, after = model.logits(tokens, documents), model.logits(other, documents)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(model.logits(tokens)[:, 4:], model.logits(other)[:, 4:])
