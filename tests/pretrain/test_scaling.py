"""The model of step time: its pipeline formula against a simulation, its traffic against hand counts, its choices against its rules."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import loss
from model.cost import flops
from model.memory import held_parameters
from pretrain import gpus
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.gpus import GPUS, Gpu
from pretrain.layout import Layout, layout_on
from pretrain.ledger import peak_flops
from pretrain.recommend import RESOLUTION, recommend
from pretrain.scaling import Estimate, efficiency, estimate, mixing_passes, pipeline_time
from pretrain.shares import shares, stage_memory

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]
SMALL = ["train.global_batch=64", "train.micro_batch=2"]


def on(ranks: int, *overrides: str, name: str = "attractor-140m", gpu: Gpu = H100) -> Estimate:
    recipe = load_recipe(name, [*SMALL, *overrides])
    return estimate(recipe, layout_on(recipe.layout, ranks), gpu)


def simulated(forward: list[float], backward: list[float], count: int) -> float:
    """Seconds of a 1F1B step of `count` micro-batches: each stage in the order of its schedule, each pass when what it needs is there."""
    stages = len(forward)
    order = [
        sorted([(p + 2 * m, 0, m) for m in range(count)] + [(2 * stages - 1 - p + 2 * m, 1, m) for m in range(count)])
        for p in range(stages)
    ]
    done: dict[tuple[int, int, int], float] = {}
    clock, waiting = [0.0] * stages, [list(reversed(passes)) for passes in order]
    while any(waiting):
        for p in range(stages):
            while waiting[p]:
                _, back, m = waiting[p][-1]
                before = (p + 1, 1, m) if back else (p - 1, 0, m)
                if 0 <= before[0] < stages and before not in done:
                    break
                clock[p] = max(clock[p], done.get(before, 0.0)) + (backward[p] if back else forward[p])
                done[p, back, m] = clock[p]
                waiting[p].pop()
    return max(clock)


TIMES = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(TIMES, st.floats(0.5, 3), st.floats(0.1, 3), st.integers(1, 10))
def test_the_pipeline_takes_no_longer_than_the_formula(forward: list[float], ratio: float, last: float, count: int) -> None:
    # backward over forward is one ratio on all stages but the last, whose solve has no backward
    backward = [time * ratio for time in forward[:-1]] + [forward[-1] * min(ratio, last)]
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    said = pipeline_time(stages, count)
    assert count * max(stages) <= simulated(forward, backward, count) * (1 + 1e-9)
    assert simulated(forward, backward, count) <= said * (1 + 1e-9)


@given(TIMES, st.floats(0.5, 3), st.integers(1, 10))
def test_the_formula_is_exact_where_the_last_stage_is_the_slowest(forward: list[float], ratio: float, count: int) -> None:
    forward = sorted(forward)
    backward = [time * ratio for time in forward]
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    assert simulated(forward, backward, count) == pytest.approx(pipeline_time(stages, count))


@given(st.integers(1, 9), st.integers(1, 40))
def test_equal_stages_have_the_familiar_bubble(stages: int, count: int) -> None:
    assert efficiency([2.0] * stages, count) == pytest.approx(count / (count + stages - 1))


def test_one_rank_computes_and_sends_nothing() -> None:
    said = on(1)
    assert set(said.sent.values()) == {0.0}
    assert {part for part, seconds in said.seconds.items() if seconds} == {"compute", "optimizer"}
    assert said.step_overlapped == said.step


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("overrides", [[], ["layout.tensor=2", "layout.pipeline=2"]])
def test_parts_add_up_to_the_step_and_the_step_to_throughput(ranks: int, overrides: list[str]) -> None:
    if ranks == 1:
        overrides = []
    said, recipe = on(ranks, *overrides, "train.micro_batch=1"), load_recipe("attractor-140m")
    assert sum(said.seconds.values()) == pytest.approx(said.step)
    tokens = 64 * 2048
    assert said.tokens_per_second == pytest.approx(tokens / said.step / ranks)
    needed = flops(recipe.architecture, 2048, recipe.solver.expected_iterations).model * tokens
    assert said.mfu == pytest.approx(needed / (said.step * ranks * (peak_flops("H100", "bf16") or 0)))
    assert 0 < said.mfu < H100.matrix_share


def test_a_block_and_an_iteration_send_two_all_reduces_forward() -> None:
    ranks, activations = 4, 2 * 2048 * 1024 * 2  # b s w and bytes a value
    an_all_reduce = 2 * (ranks - 1) / ranks * activations
    said = on(8, "layout.tensor=4")
    assert said.block_bytes == pytest.approx(4 * an_all_reduce)  # two forward, two backward
    assert said.iteration_bytes == pytest.approx(2 * an_all_reduce)
    assert on(8, "layout.tensor=4", "attractor.layers=3").iteration_bytes == pytest.approx(3 * 2 * an_all_reduce)


def test_traffic_of_the_solve_follows_its_iterations_and_that_of_blocks_their_number() -> None:
    base = ["layout.tensor=2", "solver.expected_iterations=4"]
    said, longer = on(2, *base), on(2, *base, "solver.expected_iterations=9")
    micro_batches = 64 / 2
    assert longer.sent["solve"] - said.sent["solve"] == pytest.approx(5 * micro_batches * said.iteration_bytes)
    assert longer.sent["backbone"] == said.sent["backbone"]
    deeper = on(2, *base, "model.backbone_layers=10")
    assert deeper.sent["backbone"] - said.sent["backbone"] == pytest.approx(3 * micro_batches * said.block_bytes)
    assert deeper.sent["solve"] == said.sent["solve"]


def test_divided_tokens_send_no_more_and_compute_less() -> None:
    plain, divided = (
        on(8, "layout.tensor=4", "train.micro_batch=16", f"layout.sequence_parallel={divided}") for divided in ("false", "true")
    )
    assert divided.sent["solve"] == plain.sent["solve"]
    assert divided.block_bytes == plain.block_bytes
    assert divided.sent["backbone"] <= plain.sent["backbone"]
    assert divided.seconds["compute"] < plain.seconds["compute"]


@pytest.mark.parametrize(("zero", "bytes_a_parameter"), [(1, 8 + 2), (2, 8 * 8 + 2), (3, (4 + 2 * 2) * 8)])
def test_gradients_and_weights_a_step(zero: int, bytes_a_parameter: int) -> None:
    recipe = load_recipe("attractor-140m", [*SMALL, f"layout.zero={zero}"])
    (_, share), *_ = shares(recipe, Layout(data=4))
    held = held_parameters(recipe.architecture, share).total
    assert on(4, f"layout.zero={zero}").sent["gradients"] == pytest.approx(held * bytes_a_parameter * 3 / 4)  # 8 micro-batches


def test_links_between_nodes_are_slower_and_shared_by_rings_through_every_adapter() -> None:
    inside, across = on(8, "layout.tensor=4"), on(8, "layout.tensor=4", gpu=replace(H100, node=1))
    assert across.seconds["solve"] > 3 * inside.seconds["solve"]
    one, eight = (on(64, f"layout.tensor={tensor}", "train.micro_batch=1") for tensor in (8, 1))
    rate = [said.sent["gradients"] / said.seconds["gradients"] for said in (one, eight)]
    assert rate[0] == pytest.approx(H100.network * H100.link_share, rel=0.05), "a data group with one rank a node"
    assert rate[1] == pytest.approx(8 * H100.network * H100.link_share, rel=0.05), "and with eight"


def test_reduction_may_hide_behind_backward_and_never_more() -> None:
    for zero in (1, 2):
        said = on(8, f"layout.zero={zero}")
        assert said.step - said.seconds["gradients"] <= said.step_overlapped < said.step


def test_pipeline_parts() -> None:
    said = on(4, "layout.pipeline=4")
    assert len(said.stage_seconds) == 4
    assert said.seconds["bubble"] == pytest.approx(sum(said.stage_seconds) - max(said.stage_seconds))
    parts = ("compute", "backbone", "solve", "stages")
    assert sum(said.seconds[part] for part in parts) == pytest.approx(16 * 2 * max(said.stage_seconds)), "32 micro-batches"
    boundary = 2 * 2048 * 1024 * 2  # b s w and bytes a value
    assert said.sent["stages"] in (32 * boundary, 2 * 32 * boundary), "the slowest stage has one neighbour or two"


def test_better_hardware_is_no_slower() -> None:
    assert on(8, gpu=GPUS["h200"]).step < on(8).step
    assert on(8, "layout.tensor=2", gpu=replace(H100, nvlink=1e9)).step > on(8, "layout.tensor=2").step


def test_small_micro_batches_wait_for_the_host() -> None:
    per_sequence = [on(1, f"train.micro_batch={size}").seconds["compute"] for size in (1, 8, 16)]
    assert per_sequence[0] > 1.1 * per_sequence[1]
    assert per_sequence[1] == pytest.approx(per_sequence[2])


def test_counts_made_by_reading_the_code_still_hold() -> None:
    assert loss._LOGITS_AT_ONCE == gpus.LOGITS_AT_ONCE
    assert [mixing_passes(history) for history in (0, 1, 2, 4)] == sorted(mixing_passes(history) for history in (0, 1, 2, 4))


@pytest.mark.parametrize("ranks", [1, 8, 48, 256])
@pytest.mark.parametrize("name", ["attractor-140m", "attractor-770m", "transformer-1.3b"])
def test_what_is_recommended_is_legal_fits_and_is_near_the_fastest(name: str, ranks: int) -> None:
    recipe = load_recipe(name)
    found = recommend(recipe, ranks, H100)
    assert len({candidate.layout for candidate in found}) == len(found)
    for candidate in found:
        chosen = load_recipe(name, candidate.overrides(recipe))  # raises Refusal if it is not legal
        assert (chosen.layout, chosen.train.micro_batch) == (candidate.section, candidate.micro_batch)
        layout = layout_on(chosen.layout, ranks)
        assert layout == candidate.layout
        held = [stage_memory(chosen, layout, share, chosen.layout.zero).total for _, share in shares(chosen, layout)]
        assert max(held) == candidate.memory <= H100.usable * H100.memory
        assert estimate(chosen, layout, H100) == candidate.estimate
    fastest = min(candidate.estimate.step for candidate in found)
    assert found[0].estimate.step <= fastest * (1 + RESOLUTION)


def test_a_model_too_large_for_one_gpu_is_cut() -> None:
    recipe = load_recipe("transformer-1.3b")
    small = replace(H100, memory=12e9)
    assert recommend(recipe, 8, small)[0].section.zero > 1
    only_pipeline = [c for c in recommend(recipe, 8, replace(H100, memory=9e9)) if c.layout.cuts_model]
    assert only_pipeline, "cutting the model makes it fit too"


def test_nothing_to_recommend_is_refused_with_a_remedy() -> None:
    with pytest.raises(Refusal, match=r"fits 1 GB of .*Take more GPUs"):
        recommend(load_recipe("attractor-770m"), 8, replace(H100, memory=1e9))
    with pytest.raises(Refusal, match=r"Try 256 or 512|Try 256 GPUs"):
        recommend(load_recipe("attractor-140m"), 509, H100)


def test_none_of_it_imports_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import pretrain.scaling, pretrain.recommend, pretrain.shares"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shares_keep_what_is_in_flight() -> None:
    recipe: Recipe = load_recipe("attractor-140m", ["layout.pipeline=4", *SMALL])
    assert [share.in_flight for _, share in shares(recipe, Layout(pipeline=4, data=8))] == [4, 3, 2, 1]
    assert [share.in_flight for _, share in shares(recipe, Layout(pipeline=4, data=16))] == [2, 2, 2, 1]
