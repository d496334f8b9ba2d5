"""Closed forms and roles of the models that loop or solve for a hidden state, against what is built and what runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.cost import Work, count_parameters, flops, planned
from model.language_model import build
from model.memory import activation_bytes, held_parameters, memory, whole
from model.noise import poisson_counts, sequence_seeds
from model.roles import Role, parameter_roles
from tests.model.support import random_tokens
from tests.model.test_cost import LENGTH, config_with, split
from tests.model.test_cost_of_ranks import names_on, stages
from tests.model.test_memory import saved_bytes

BATCH = 3


def kinds() -> list[ModelConfig]:
    """Every way a loop or a deq can be made that changes what it costs."""
    loops = [
        config_with(
            model={
                "kind": kind,
                "value_embeddings": tables,
                "kv_heads": 2,
                "mlp": "swiglu" if tables else "relu2",
                "backbone_layers": layers,
            },
            loop={"core": core, "coda": coda, "iterations": 3, "backprop": backprop},
        )
        for kind, tables, (layers, core, coda), backprop in product(("parcae", "looped"), (False, True), ((4, 2, 1), (3, 3, 0)), (2, None))
    ]
    deqs = [
        config_with(
            model={"kind": "deq", "tied_embeddings": tied, "backbone_layers": layers}, attractor={"layers": 2}, gradient={"mode": mode}
        )
        for tied, layers, mode in product((True, False), (0, 2), ("one_step", "adjoint"))
    ]
    return [*loops, *deqs]


def counted(config: ModelConfig, recompute: bool) -> tuple[float, float, Work]:
    """FLOPs a token of forward and of backward as FlopCounterMode sees them, and the work that the record tells."""
    model, tokens = build(config, recompute=recompute), random_tokens(BATCH, LENGTH, 48, seed=4)
    with FlopCounterMode(display=False) as forward:
        model(tokens, tokens)
    loss, record = model(tokens, tokens)  # outside: the counter's module hooks do not survive autograd.grad inside a backward
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    done = Work(*(float(record[name]) for name in ("solver_evaluations", "applications")), float(record.get("products", 0)))
    return forward.get_total_flops() / tokens.numel(), backward.get_total_flops() / tokens.numel(), done


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_a_training_step_are_those_counted(recompute: bool) -> None:
    for config in kinds():
        forward, backward, work = counted(config, recompute)
        said = flops(config, LENGTH, work.evaluations, products=work.products, applications=work.applications, recompute=recompute)
        assert split(said) == pytest.approx((forward, backward), rel=1e-6), config  # the record's means are fp32


def test_value_embeddings_cost_no_products_but_their_gate() -> None:
    with_tables, without = (config_with(model={"kind": "transformer", "value_embeddings": tables}) for tables in (True, False))
    gate = 2 * 8 * 4  # two of three blocks have one: 8 channels to 4 heads
    assert flops(with_tables, LENGTH, 0).model - flops(without, LENGTH, 0).model == pytest.approx(3 * 2 * gate)
    assert count_parameters(with_tables).value_embedding == 2 * 48 * 32


@pytest.mark.parametrize("kind", ["parcae", "looped"])
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_flops_of_evaluation(kind: str, depth: int) -> None:
    config = config_with(model={"kind": kind, "value_embeddings": True}, loop={"core": 1, "coda": 1})
    model, tokens = build(config), random_tokens(BATCH, LENGTH, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, tokens, depths=[depth])
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops(config, LENGTH, depth, training=False).model, rel=1e-9)


@pytest.mark.parametrize(("mean", "backprop"), [(1, 1), (3, 4), (8, 4), (8, 1), (8, None), (30, 12)])
def test_a_plan_expects_what_sequences_draw(mean: int, backprop: int | None) -> None:
    config = config_with(model={"kind": "parcae"}, loop={"core": 1, "coda": 1, "iterations": mean, "backprop": backprop})
    counts = poisson_counts(sequence_seeds(random_tokens(40_000, 4, vocabulary=4096)), mean)
    kept = [count if backprop is None else min(count, backprop) for count in counts]
    work = planned(config)
    error = 5 * (mean / len(counts)) ** 0.5  # five standard errors
    assert abs(work.applications - sum(kept) / len(counts)) < error
    assert abs(work.applications + work.evaluations - sum(counts) / len(counts)) < error
    assert (
        flops(config, LENGTH, work.evaluations).hardware == flops(config, LENGTH, work.evaluations, applications=work.applications).hardware
    )


def test_a_plan_at_given_iterations() -> None:
    parcae = config_with(model={"kind": "parcae"}, loop={"core": 1, "coda": 1, "iterations": 8, "backprop": 4})
    for mean in (1, 3, 16):  # iterations of a Parcae are the mean of what it draws
        assert planned(parcae, mean) == planned(replace(parcae, loop=replace(parcae.loop, iterations=mean)))
    looped = replace(parcae, model=replace(parcae.model, kind="looped"))
    assert planned(looped) == Work(0, 8, 0)
    assert planned(config_with(model={"kind": "transformer"}), 5) == Work(0, 0, 0)
    assert planned(config_with(gradient={"mode": "phantom", "steps": 2}), 5) == Work(5, 2, 0)
    assert planned(config_with(gradient={"mode": "neumann", "steps": 2}), 5) == Work(5, 1, 2)


def test_parameters_are_those_of_the_model_and_of_each_stage() -> None:
    for config in kinds():
        model, count = build(config, device="meta"), count_parameters(config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        assert count.total == sum(sizes.values()), config
        assert count.value_embedding == sum(size for name, size in sizes.items() if "value_embeddings" in name), config
        matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name and not name.startswith("head")]
        assert count.matmul == sum(sizes[name] for name in matrices), config
        for bounds in ([0, config.prelude], [0, 1, config.prelude]) if config.prelude > 1 else ([0, config.prelude],):
            for share in stages(config, bounds):
                names, held = names_on(model, share), held_parameters(config, share)
                assert held.total == sum(sizes[name] for name in names), config
                whole_on_all = ("norm.weight", "gate.raw", "decay_log", "step_bias", "injection.input.weight", "readout.weight")
                assert held.replicated == sum(sizes[name] for name in names if name.endswith(whole_on_all)), config


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "backprop"), [("parcae", 2), ("parcae", None), ("looped", None), ("deq", None)])
def test_the_estimate_of_activations_is_near(kind: str, backprop: int | None, recompute: bool) -> None:
    shape = {"kind": kind, "vocabulary_size": 64, "width": 128, "backbone_layers": 4}
    config = config_with(1, model=shape, loop={"core": 2, "coda": 1, "iterations": 6, "backprop": backprop})
    tokens = random_tokens(1, 128, 64, seed=3)
    if kind == "parcae" and backprop is None:  # the estimate is of the mean: give the loop this sequence's own count
        (count,) = poisson_counts(sequence_seeds(tokens), 6)
        expected = replace(config, model=replace(config.model, kind="looped"), loop=replace(config.loop, iterations=count))
    else:
        expected = config
    kept = saved_bytes(build(config, recompute=recompute), tokens) - 4 * 64 * 128  # the unembedding's gradient, which no token adds to
    if not recompute:
        assert kept / tokens.numel() == pytest.approx(activation_bytes(expected, 4), rel=0.15)
    else:  # what is saved leaves out the one block that lives while it is computed again
        assert kept / tokens.numel() < activation_bytes(expected, 4, recompute=True)
        assert activation_bytes(expected, 4, recompute=True) < 0.5 * activation_bytes(expected, 4) or kind == "deq"


def test_a_deq_pays_for_its_solver_and_a_loop_for_none() -> None:
    deq, looped = (config_with(model={"kind": kind}, loop={"core": 1, "coda": 0}) for kind in ("deq", "looped"))
    sizes = {"bytes_per_value": 4, "zero": 1, "data_ranks": 1}
    assert memory(deq, LENGTH, BATCH, **sizes).solver == memory(config_with(), LENGTH, BATCH, **sizes).solver > 0
    assert memory(looped, LENGTH, BATCH, **sizes).solver == 0
    assert held_parameters(looped, whole(looped)).total == count_parameters(looped).total


def expected_role(name: str, config: ModelConfig) -> Role:
    special: dict[str, Any] = {"embedding.weight": Role.EMBEDDING, "head.weight": Role.HEAD, "norm.weight": Role.BACKBONE_VECTOR}
    if name in special:
        return special[name]
    if ".value_embeddings." in name:
        return Role.VALUE_EMBEDDING
    if name in ("refine.injection.input.weight", "refine.readout.weight"):
        return Role.LOOP_MATRIX
    inside = name.startswith("refine.") and config.model.kind == "deq"
    vector = name.endswith(("norm.weight", "gate.raw", "value_gate.projection.weight", "decay_log", "step_bias"))
    if vector:
        return Role.ATTRACTOR_VECTOR if inside else Role.BACKBONE_VECTOR
    return Role.ATTRACTOR_MATRIX if inside else Role.BACKBONE_MATRIX


def test_roles() -> None:
    for config in kinds():
        model = build(config, device="meta")
        assert parameter_roles(model) == {name: expected_role(name, config) for name, _ in model.named_parameters()}
