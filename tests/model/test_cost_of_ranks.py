"""What ranks hold of a model that stages and tensor ranks divide: parameters by the modules there, bytes against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.cost import count_parameters
from model.language_model import LanguageModel, build
from model.layers import Layers, PlainLayers
from model.memory import Share, activation_bytes, held_parameters, memory, whole
from tests.model.support import random_tokens
from tests.model.test_cost import BATCH, LENGTH, config_with, options
from tests.model.test_memory import saved_bytes


def stages(config: ModelConfig, bounds: list[int], tensor: int = 1) -> list[Share]:
    """Shares of a pipeline cut before the blocks `bounds`."""
    last = len(bounds) - 2
    return [Share(first, stop, p == 0, p == last, tensor) for p, (first, stop) in enumerate(pairwise(bounds))]


def names_on(model: LanguageModel, share: Share) -> list[str]:
    """Parameters of one stage, by the modules it holds."""
    blocks = range(share.first, share.stop)
    prefixes = [f"backbone.blocks.{n}." for n in blocks] + [f"backbone.value_embeddings.{n}." for n in blocks]
    prefixes += ["embedding."] * (share.start or (share.end and model.head is None)) + ["refine.", "norm.", "head."] * share.end
    return [name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))]


REPLICATED = ("norm.weight", "gate.raw", "merge.weight")
"""Ends of the names of parameters that every tensor rank holds whole."""


@pytest.mark.parametrize("bounds", [[0, 3], [0, 2, 3], [0, 1, 2, 3]])
def test_parameters_of_a_stage_are_those_of_its_modules(bounds: list[int]) -> None:
    for config in options():
        config = replace(config, model=replace(config.model, backbone_layers=3))
        model = build(config, device="meta")
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        for share in stages(config, bounds):
            names = names_on(model, share)
            assert held_parameters(config, share).total == sum(sizes[name] for name in names), config
            divided = sum(sizes[name] for name in names if not name.endswith(REPLICATED))
            assert held_parameters(config, share).divided == divided, config
            muon = [name for name in names if name.startswith("backbone.blocks.") and model.get_parameter(name).ndim == 2]
            assert held_parameters(config, share).backbone_matrices == sum(sizes[name] for name in muon if "value_gate" not in name), config


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("bounds", [[0, 3], [0, 2, 3], [0, 1, 2, 3], [0, 2, 3, 3]])
def test_ranks_hold_every_parameter_once_beside_their_copies(tensor: int, bounds: list[int]) -> None:
    for config in options():
        config = replace(config, model=replace(config.model, backbone_layers=3, kv_heads=2))
        if config.model.kind == "transformer" and bounds[-1] == bounds[-2]:
            continue
        held = [held_parameters(config, share) for share in stages(config, bounds, tensor)]
        copies = (tensor - 1) * sum(stage.replicated for stage in held)
        table = config.model.tied_embeddings and len(held) > 1
        copies += count_parameters(config).embedding if table else 0
        assert tensor * sum(stage.total for stage in held) - copies == count_parameters(config).total, config


def test_the_whole_model_is_one_share() -> None:
    config = config_with()
    assert held_parameters(config, whole(config)).total == count_parameters(config).total
    assert memory(config, LENGTH, 2, bytes_per_value=2, zero=1, data_ranks=4) == memory(
        config, LENGTH, 2, bytes_per_value=2, zero=1, data_ranks=4, share=whole(config)
    )


def test_solver_memory_is_the_last_stage_s_divided_over_tensor_ranks_and_the_larger_of_two_solves() -> None:
    def solver(config: ModelConfig, share: Share) -> float:
        return memory(config, LENGTH, BATCH, bytes_per_value=2, zero=1, data_ranks=1, share=share).solver

    config = config_with(solver={"history": 2})
    state = 4 * BATCH * LENGTH * config.model.width
    assert solver(config, whole(config)) == (5 + 2 * 2) * state
    for divided in (False, True):
        assert solver(config, replace(whole(config), tensor=4, sequence_parallel=divided)) == (5 + 2 * 2) * state / 4
    assert solver(config, Share(0, 3, start=True, end=False)) == 0
    assert solver(replace(config, solver=replace(config.solver, method="picard")), whole(config)) == 5 * state
    adjoint = replace(config, gradient=replace(config.gradient, mode="adjoint"))
    assert solver(adjoint, whole(adjoint)) == (5 + 2 * 4) * state


def test_micro_batches_in_flight_multiply_what_a_stage_keeps() -> None:
    config = config_with()
    for recompute in (False, True):
        one, two, three = (
            activation_bytes(config, 2, recompute=recompute, share=Share(0, 2, start=True, end=False, in_flight=count))
            for count in (1, 2, 3)
        )
        assert three - two == two - one > 0
        assert (one == two - one) == (not recompute), "one block at a time is computed again, whatever is in flight"


class OneOfRanks(PlainLayers):
    """The shapes one of `ranks` tensor ranks would have, without the others: what it keeps can be measured in one process."""

    def __init__(self, ranks: int, divided: bool) -> None:
        self.ranks, self.is_divided = ranks, divided

    def column(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs // self.ranks, bias=False)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        return Left(inputs // self.ranks, outputs, self)

    def embedding(self, rows: int, width: int) -> nn.Module:
        return Table(rows, width, self)

    def value_embedding(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows, width // self.ranks)

    def local_heads(self, heads: int) -> int:
        return heads // self.ranks

    def enter(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.ranks, dim=1) if self.is_divided else x

    def leave(self, x: Tensor) -> Tensor:
        return x.chunk(self.ranks, dim=1)[0].clone() if self.is_divided else x

    def divided(self) -> Layers:
        return OneOfRanks(self.ranks, divided=True)

    def divide(self, x: Tensor) -> Tensor:
        return x if self.is_divided else x.chunk(self.ranks, dim=1)[0].clone()


class Left(nn.Linear):
    def __init__(self, inputs: int, outputs: int, layers: OneOfRanks) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.leave(super().forward(x))


class Table(nn.Embedding):
    def __init__(self, rows: int, width: int, layers: OneOfRanks) -> None:
        super().__init__(rows, width)
        self.layers = layers

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers.leave(super().forward(tokens))


@pytest.mark.parametrize("kind", ["attractor", "transformer"])
@pytest.mark.parametrize(("tensor", "divided"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_the_estimate_of_activations_is_near_on_tensor_ranks(kind: str, tensor: int, divided: bool) -> None:
    config = config_with(1, model={"kind": kind, "vocabulary_size": 64, "width": 128, "backbone_layers": 3})
    model = build(config, layers=OneOfRanks(tensor, divided))
    tokens = random_tokens(2, 128, 64)
    kept = saved_bytes(model, tokens) - 4 * 64 * 128  # the unembedding's gradient, which no token adds to
    share = replace(whole(config), tensor=tensor, sequence_parallel=divided)
    assert kept / tokens.numel() == pytest.approx(activation_bytes(config, 4, share=share), rel=0.15)
