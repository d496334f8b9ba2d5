"""Rank arithmetic by its properties: a bijection, groups that partition the world, refusals whose remedies are legal and nearest."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model.config import BackboneConfig, ModelConfig
from pretrain.config import load_recipe
from pretrain.errors import Refusal
from pretrain.layout import Axis, Coordinates, Layout, layout_on, most_stages, neighbours, refuse_illegal
from pretrain.sections import LayoutSection

SIZES = st.integers(1, 4)
LAYOUTS = st.builds(Layout, SIZES, SIZES, SIZES)
AXES: list[Axis] = ["pipe", "data", "tensor"]


@st.composite
def backbones(draw: st.DrawFn) -> BackboneConfig:
    key_value_heads, group = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4]))
    heads = key_value_heads * group
    return BackboneConfig(
        kind=draw(st.sampled_from(["attractor", "transformer"])),
        width=heads * draw(st.sampled_from([2, 8])),
        heads=heads,
        kv_heads=key_value_heads,
        backbone_layers=draw(st.integers(1, 9)),
        mlp_width=draw(st.sampled_from([12, 16, 30, 48])),
        vocabulary_size=draw(st.sampled_from([None, 48, 60, 97])),
    )


def illegal(section: LayoutSection, model: BackboneConfig, length: int | None = None) -> str | None:
    """Why a layout is refused; None where it is not."""
    try:
        refuse_illegal(section, ModelConfig(model), length)
    except ValueError as error:
        return str(error)
    return None


@given(LAYOUTS)
def test_ranks_and_coordinates_are_one_to_one(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.ranks)]
    assert [layout.rank(*place) for place in places] == list(range(layout.ranks))
    assert set(places) == {Coordinates(p, d, t) for p in range(layout.pipeline) for d in range(layout.data) for t in range(layout.tensor)}
    assert places == sorted(places), "tensor is fastest, pipe outermost"


@given(LAYOUTS)
def test_groups_partition_the_world_and_differ_along_their_axes_alone(layout: Layout) -> None:
    for count in range(4):
        for axes in combinations(AXES, count):
            groups = layout.groups(*axes)
            assert sorted(rank for group in groups for rank in group) == list(range(layout.ranks))
            size = 1
            for axis in axes:
                size *= {"pipe": layout.pipeline, "data": layout.data, "tensor": layout.tensor}[axis]
            for group in groups:
                assert len(group) == size
                assert group == sorted(group)
                for axis in set(AXES) - set(axes):
                    assert len({getattr(layout.coordinates(rank), axis) for rank in group}) == 1


@given(LAYOUTS)
def test_tensor_ranks_are_neighbours_and_a_stage_is_a_run(layout: Layout) -> None:
    assert all(group == list(range(group[0], group[0] + layout.tensor)) for group in layout.groups("tensor"))
    stage = layout.data * layout.tensor
    assert layout.groups("data", "tensor") == [list(range(p * stage, (p + 1) * stage)) for p in range(layout.pipeline)]


def test_an_example_by_hand() -> None:
    layout = Layout(pipeline=2, data=2, tensor=2)
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.coordinates(5) == Coordinates(pipe=1, data=0, tensor=1)
    assert layout.describe() == "pipeline 2 x data 2 x tensor 2"
    assert layout.cuts_model
    assert not Layout(data=8).cuts_model


@given(SIZES, SIZES, st.integers(1, 64))
def test_data_parallel_fills_the_rest_or_the_worlds_named_do(tensor: int, pipeline: int, ranks: int) -> None:
    section, replica = LayoutSection(tensor=tensor, pipeline=pipeline), tensor * pipeline
    if ranks % replica == 0:
        layout = layout_on(section, ranks)
        assert (layout.ranks, layout.tensor, layout.pipeline) == (ranks, tensor, pipeline)
        return
    with pytest.raises(Refusal) as refused:
        layout_on(section, ranks)
    named = [int(n) for n in re.findall(r"\d+", re.findall(r"Start (.*?) ranks", str(refused.value))[0])]
    assert all(layout_on(section, n).ranks == n for n in named)
    legal = [n for n in range(1, ranks + replica + 1) if n % replica == 0]
    assert set(named) == {
        min(legal, key=lambda n: abs(n - ranks) if n > ranks else 10**6),
        max(n for n in legal if n < ranks or n == legal[0]),
    }


@given(backbones(), st.integers(1, 12), st.sampled_from([None, 16, 24]), st.booleans())
def test_tensor_sizes_are_those_that_divide_and_the_neighbours_named_are_legal(
    model: BackboneConfig, tensor: int, length: int | None, divided: bool
) -> None:
    """The length is divided where tokens are: in an attractor's solve, and everywhere under sequence parallelism."""

    def section(n: int) -> LayoutSection:
        return LayoutSection(tensor=n, sequence_parallel=divided and n > 1)

    legal = [n for n in range(1, 13) if illegal(section(n), model, length) is None]
    shared = [model.heads, model.key_value_heads, model.hidden, model.vocabulary_size]
    shared += [length] if divided or model.kind == "attractor" else []
    assert legal == [n for n in range(1, 13) if all(size is None or size % n == 0 for size in shared)]
    said = illegal(section(tensor), model, length)
    if said is None:
        return
    named = [int(n) for n in re.findall(r"\d+", said.partition("may be ")[2])]
    assert named == [n for n in legal if n < tensor][-1:] + [n for n in legal if n > tensor][:1]
    assert 1 in legal, "so there is always one to name"


@given(backbones(), st.integers(1, 12))
def test_a_pipeline_has_at_most_a_stage_a_layer_and_the_bound_named_is_legal(model: BackboneConfig, pipeline: int) -> None:
    said = illegal(LayoutSection(pipeline=pipeline), model)
    most = model.backbone_layers + (model.kind == "attractor")
    assert most_stages(ModelConfig(model)) == most
    assert (said is None) == (pipeline <= most)
    if said is not None:
        assert f"Use layout.pipeline={most} or less" in said
        assert illegal(LayoutSection(pipeline=most), model) is None


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_zero_stages_that_go_with_a_cut_model(zero: int, tensor: int, pipeline: int) -> None:
    model = BackboneConfig(vocabulary_size=48)
    said = illegal(LayoutSection(tensor=tensor, pipeline=pipeline, zero=zero), model)
    allowed = {0, 1, 2, 3} if tensor == pipeline == 1 else {1} if pipeline > 1 else {1, 2, 3}
    assert (said is None) == (zero in allowed)
    if said is not None:
        assert "Use layout.zero=1" in said
        assert illegal(LayoutSection(tensor=tensor, pipeline=pipeline, zero=1), model) is None


def test_dividing_tokens_needs_tensor_ranks() -> None:
    model = BackboneConfig(vocabulary_size=48)
    assert "layout.tensor=1 has one" in str(illegal(LayoutSection(sequence_parallel=True), model))
    assert illegal(LayoutSection(sequence_parallel=True, tensor=2), model) is None


@given(st.integers(0, 50), st.sets(st.integers(1, 40)))
def test_neighbours_are_the_nearest_on_either_side(value: int, legal: set[int]) -> None:
    assume(value not in legal)
    named = [int(n) for n in neighbours(value, legal).split(" or ") if n]
    assert set(named) <= legal
    assert all(not min(n, value) < other < max(n, value) for n in named for other in legal)
    assert len(named) == (min(legal, default=value) < value) + (max(legal, default=value) > value)


def test_recipes_refuse_illegal_layouts_with_the_layout_and_the_recipe_named() -> None:
    with pytest.raises(Refusal, match=r"layout\.tensor=3 does not divide model\.heads=8.*may be 2 or 4.*'attractor-140m'"):
        load_recipe("attractor-140m", ["layout.tensor=3"])
    with pytest.raises(Refusal, match=r"layout\.zero=3 cannot be combined with layout\.pipeline=2"):
        load_recipe("attractor-140m", ["layout.pipeline=2", "layout.zero=3"])
    with pytest.raises(Refusal, match=r"at most 8 stages"):
        load_recipe("attractor-140m", ["layout.pipeline=9"])
