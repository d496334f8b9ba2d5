"""Blocks dealt to pipeline stages: in order, none lost, and as evenly as any way of dealing them can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig, SolverConfig
from model.cost import flops
from pretrain.config import load_recipe, recipe_names
from pretrain.layout import most_stages
from pretrain.partition import balance, layer_flops, partition


def dealings(layers: int, stages: int, smallest_last: int) -> list[list[int]]:
    """Every way to deal `layers` in order to `stages`, the last of which may take as few as smallest_last."""
    cuts = combinations(range(1, layers + 1 - smallest_last), stages - 1)
    return [[b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)] for cut in cuts]


def score(counts: Sequence[int], costs: Sequence[int], tail: int) -> tuple[int, int]:
    """(largest cost of a stage, sum of squares)."""
    bounds = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    stages = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    stages[-1] += tail
    return max(stages), sum(cost * cost for cost in stages)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 30), st.integers(1, 6), st.integers(0, 1))
def test_no_other_dealing_is_better(costs: list[int], tail: int, stages: int, smallest_last: int) -> None:
    every = dealings(len(costs), stages, smallest_last)
    if not every:
        with pytest.raises(ValueError, match="do not make"):
            balance(costs, tail, stages, smallest_last)
        return
    found = balance(costs, tail, stages, smallest_last)
    assert found in every
    assert score(found, costs, tail) == min(score(counts, costs, tail) for counts in every)


MODELS = st.builds(
    lambda kind, layers, tables, attractor, iterations, mode: ModelConfig(
        BackboneConfig(kind=kind, vocabulary_size=512, width=64, heads=4, backbone_layers=layers, value_embeddings=tables),
        AttractorConfig(layers=attractor),
        SolverConfig(expected_iterations=iterations),
        GradientConfig(mode=mode),
    ),
    st.sampled_from(["attractor", "transformer"]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([0.0, 2.5, 6.0, 40.0]),
    st.sampled_from(["one_step", "adjoint"]),
)


@given(MODELS, st.integers(1, 10), st.booleans())
def test_stages_are_the_blocks_in_order_and_hold_every_flop(config: ModelConfig, stages: int, recompute: bool) -> None:
    stages = min(stages, most_stages(config))
    dealt = partition(config, 128, stages, recompute=recompute)
    assert [stage.first for stage in dealt] == [0, *(stage.stop for stage in dealt[:-1])]
    assert dealt[-1].stop == config.model.backbone_layers
    assert all(stage.stop > stage.first for stage in dealt[:-1]), "only the attractor's stage may be without blocks"
    whole = flops(config, 128, config.solver.expected_iterations, recompute=recompute).hardware
    assert sum(stage.flops for stage in dealt) == pytest.approx(whole)
    block, tail = layer_flops(config, 128, recompute=recompute)
    smallest = 0 if config.model.kind == "attractor" and stages > 1 else 1
    layers = config.model.backbone_layers
    best = min(score(counts, [round(block)] * layers, round(tail)) for counts in dealings(layers, stages, smallest))
    assert score([stage.stop - stage.first for stage in dealt], [round(block)] * layers, round(tail)) == best


@pytest.mark.parametrize("name", recipe_names("language"))
def test_every_recipe_has_every_number_of_stages_it_may_ask_for(name: str) -> None:
    config = load_recipe(name).architecture
    for stages in range(1, most_stages(config) + 1):
        assert len(partition(config, 2048, stages)) == stages


def test_a_longer_solve_leaves_the_last_stage_fewer_blocks() -> None:
    config = load_recipe("attractor-370m").architecture
    last = []
    for iterations in (0.0, 8.0, 32.0):
        stage = partition(replace(config, solver=replace(config.solver, expected_iterations=iterations)), 2048, 2)[-1]
        last.append(stage.stop - stage.first)
    assert last[0] > last[1] > last[2] == 0


def test_an_example_by_hand() -> None:
    # 8 blocks of 1 and a tail of 2.5: 3, 4, 1 + 2.5 is as high as 4, 4, 2.5 and more even; 3, 3, 2 + 2.5 is higher
    assert balance([1] * 8, 2.5, 3, 0) == [3, 4, 1]
    assert balance([1] * 4, 9.0, 3, 0) == [2, 2, 0]
