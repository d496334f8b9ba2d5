"""The closed forms of parameters, FLOPs and bytes against models that are built and operations that are counted while they run."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.cost import Flops, count_parameters, flops
from model.language_model import build
from model.memory import activation_bytes, held_parameters, memory, whole
from tests.model.support import configuration, random_tokens

BATCH, LENGTH = 2, 8
SHAPE = {"vocabulary_size": 48, "width": 32, "heads": 4, "backbone_layers": 3, "value_gate_channels": 8}


def config_with(evaluations: int = 3, **sections: dict[str, Any]) -> ModelConfig:
    model = {**SHAPE, **sections.pop("model", {})}
    solver = {"min_iterations": evaluations, "max_iterations": evaluations, **sections.pop("solver", {})}
    return configuration(model=model, solver=solver, **sections)


def counted(config: ModelConfig, recompute: bool = False) -> tuple[float, float]:
    """FLOPs a token of forward and of backward, as FlopCounterMode sees them; backward's products are those that ran."""
    model = build(config, recompute=recompute)
    tokens, targets = random_tokens(BATCH, LENGTH, 48), random_tokens(BATCH, LENGTH, 48, seed=1)
    with FlopCounterMode(display=False) as forward:
        model(tokens, targets)
    loss, _ = model(tokens, targets)  # outside: the counter's module hooks do not survive autograd.grad inside a backward
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() / (BATCH * LENGTH), backward.get_total_flops() / (BATCH * LENGTH)


def split(cost: Flops) -> tuple[float, float]:
    """What runs in forward (the head's gradient is computed there) and in backward."""
    forward = cost.head_forward + cost.head_backward + cost.backbone_forward + cost.solve + cost.application
    return forward, cost.backbone_backward + cost.implicit_backward + cost.recomputation


BACKBONES: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu", "mlp_width": 40},
    {"kv_heads": 1},
    {"kv_heads": 2, "value_embeddings": True},
    {"value_embeddings": True, "backbone_layers": 2},
    {"tied_embeddings": False},
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda fields: "-".join(map(str, fields)) or "plain")
@pytest.mark.parametrize("kind", ["transformer", "attractor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_a_training_step_are_those_counted(backbone: dict[str, Any], kind: str, recompute: bool) -> None:
    config = config_with(model={**backbone, "kind": kind})
    # both count the same products, so the figures are equal; the floor of 1 % the project asks for is not needed
    assert split(flops(config, LENGTH, 3, recompute=recompute)) == pytest.approx(counted(config, recompute), rel=1e-9)


@pytest.mark.parametrize("evaluations", [1, 2, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_flops_follow_the_evaluations(evaluations: int, layers: int) -> None:
    config = config_with(evaluations, attractor={"layers": layers})
    assert split(flops(config, LENGTH, evaluations)) == pytest.approx(counted(config), rel=1e-9)


@pytest.mark.parametrize("injection", ["additive", "concat", "init_only", "cross_attention"])
@pytest.mark.parametrize(
    "gradient",
    [{"mode": "one_step"}, {"mode": "neumann", "steps": 1}, {"mode": "neumann", "steps": 3}, {"mode": "phantom", "steps": 3}],
    ids=["one_step", "neumann1", "neumann3", "phantom3"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_every_gradient_and_injection(injection: str, gradient: dict[str, Any], recompute: bool) -> None:
    config = config_with(attractor={"injection": injection, "layers": 2}, gradient=gradient)
    assert split(flops(config, LENGTH, 3, recompute=recompute)) == pytest.approx(counted(config, recompute), rel=1e-9)


def test_flops_of_the_adjoint_follow_the_products_that_ran() -> None:
    config = config_with(gradient={"mode": "adjoint", "tolerance": 1e-30, "max_iterations": 4})
    assert split(flops(config, LENGTH, 3, products=4)) == pytest.approx(counted(config), rel=1e-9)
    planned = config_with(gradient={"mode": "adjoint"}, solver={"expected_iterations": 4.0})
    assert flops(planned, LENGTH, 3) == flops(config, LENGTH, 3, products=4)


@pytest.mark.parametrize("compaction", [False, True])
def test_flops_follow_evaluations_as_the_record_gives_them(compaction: bool) -> None:
    # sequences that stop at different times: the measured mean of evaluations is fractional, and exact
    config = config_with(solver={"min_iterations": 1, "max_iterations": 40, "tolerance": 0.3, "method": "picard", "compaction": compaction})
    model = build(config)
    table = model.embedding.get_parameter("weight")
    with torch.no_grad():
        table.mul_(20)
        table[:4].mul_(0.1)
    tokens = random_tokens(4, LENGTH, 48)
    tokens[0] %= 4
    with FlopCounterMode(display=False) as counter:
        _, record = model(tokens, tokens)
    evaluations = float(record["solver_evaluations"])
    if compaction:
        assert evaluations == float(record["solver_iterations"])
        assert evaluations % 1 != 0, "all sequences stopped together: choose others"
    want = split(flops(config, LENGTH, evaluations))[0]
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_flops_of_evaluation(depth: int) -> None:
    config = config_with(attractor={"layers": 2})
    model, tokens = build(config), random_tokens(BATCH, LENGTH, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, tokens, depths=[depth])
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops(config, LENGTH, depth, training=False).model, rel=1e-9)


def test_masked_attention_counts_the_same() -> None:
    config = config_with()
    model, tokens = build(config), random_tokens(BATCH, LENGTH, 48)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, torch.zeros_like(tokens))
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(split(flops(config, LENGTH, 3))[0], rel=1e-9)


def test_model_flops_leave_out_what_is_done_twice() -> None:
    config = config_with()
    plain, again = flops(config, LENGTH, 3), flops(config, LENGTH, 3, recompute=True)
    assert plain.model == again.model
    assert plain.model < plain.hardware < again.hardware
    assert plain.hardware == pytest.approx(sum(asdict(plain).values()))


def options() -> list[ModelConfig]:
    kinds = [config_with(model={"kind": "transformer", **backbone, "kv_heads": kv}) for backbone, kv in product(BACKBONES, (None, 2))]
    solved = [
        config_with(model={"mlp": mlp, "kv_heads": kv}, attractor={"injection": injection, "layers": layers})
        for mlp, kv, injection, layers in product(
            ("relu2", "swiglu"), (None, 1), ("additive", "concat", "init_only", "cross_attention"), (1, 3)
        )
    ]
    return [*kinds, *solved]


def test_parameters_are_those_of_the_model() -> None:
    for config in options():
        model, count = build(config, device="meta"), count_parameters(config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        assert count.total == sum(sizes.values()), config

        def part(prefix: str, sizes: dict[str, int] = sizes) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(prefix))

        assert count.attractor == part("refine."), config
        assert count.value_embedding == part("backbone.value_embeddings."), config
        assert count.backbone == part("backbone.blocks.") + part("norm."), config
        assert count.embedding == part("embedding."), config
        assert count.head == part("head."), config
        inside = ("backbone.blocks.", "refine.")
        matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith(inside) and p.ndim == 2)
        assert count.matmul == matrices, config


def test_parameters_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary_size"):
        count_parameters(ModelConfig())


def test_memory_divides_what_zero_divides() -> None:
    config = config_with()
    total = count_parameters(config).total
    stages = [memory(config, LENGTH, BATCH, bytes_per_value=2, zero=zero, data_ranks=4) for zero in range(4)]
    assert [stage.weights / total for stage in stages] == [2, 2, 2, 0.5]
    assert [stage.gradients / total for stage in stages] == [4, 4, 1, 1]
    assert [stage.optimizer / total for stage in stages] == [12, 3, 3, 3]
    assert len({stage.activations for stage in stages}) == 1
    assert stages[0].total == pytest.approx(sum(asdict(stages[0]).values()))
    single = memory(config, LENGTH, BATCH, bytes_per_value=4, zero=0, data_ranks=1)
    copied = [memory(config, LENGTH, BATCH, bytes_per_value=4, zero=zero, data_ranks=1).optimizer for zero in range(4)]
    assert [state / total for state in copied] == [8, 12, 12, 8]  # ZeRO 1 and 2 copy fp32 weights into their partitions
    assert (single.weights, single.gradients, single.optimizer) == (4 * total, 4 * total, 8 * total)
    twice = memory(config, LENGTH, 2 * BATCH, bytes_per_value=2, zero=0, data_ranks=4)
    assert twice.activations == 2 * stages[0].activations == 2 * BATCH * LENGTH * activation_bytes(config, 2)


def test_muon_keeps_one_moment_and_an_average_is_one_more() -> None:
    config = config_with()
    adamw, muon, average = (
        memory(config, LENGTH, BATCH, bytes_per_value=2, zero=1, data_ranks=2, muon=muon, average=average).optimizer
        for muon, average in ((False, False), (True, False), (False, True))
    )
    assert adamw - muon == 4 * held_parameters(config, whole(config)).backbone_matrices / 2
    assert average - adamw == 4 * count_parameters(config).total / 2
