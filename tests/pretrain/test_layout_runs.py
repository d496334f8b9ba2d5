"""Whole runs of the trainer under tensor and pipeline layouts: samples, evaluation, exact resume, one file of whole weights."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.layout import Layout
from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import BATCH, LENGTH, SETTINGS, TARGET

pytestmark = pytest.mark.timeout(900)  # real ranks, and a machine may be slow
STEPS = 6
SHORT = [*SETTINGS, f"train.tokens={STEPS * BATCH * LENGTH}", "evaluation.every=4"]
LAYOUTS = {
    "tensor 2 x pipeline 2": (Layout(2, 1, 2), ["layout.tensor=2", "layout.pipeline=2", "layout.sequence_parallel=true"]),
    "tensor 2 x data 2, ZeRO 3": (Layout(1, 2, 2), ["layout.tensor=2", "layout.zero=3"]),
    "pipeline 2 x data 2": (Layout(2, 2, 1), ["layout.pipeline=2", "train.micro_batch=1", "data.mask_documents=true"]),
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def straight(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Any]]:
    run = tmp_path_factory.mktemp("straight") / "run"
    return request.param, run, run_ranks(TARGET, 4, str(run), str(data), [], False, [*SHORT, *LAYOUTS[request.param][1]])


def test_all_ranks_of_a_replica_see_the_same_samples(straight: tuple[str, Path, list[Any]]) -> None:
    """What a loader gave on the first stage is what the loss on the last stage was of; tensor ranks agree; replicas differ."""
    name, _, results = straight
    layout = LAYOUTS[name][0]
    by_replica = []
    for replica in range(layout.data):
        ranks = [rank for rank in range(layout.ranks) if layout.coordinates(rank).data == replica]
        first = [results[rank]["read"] for rank in ranks if layout.coordinates(rank).pipe == 0]
        last = [results[rank]["predicted"] for rank in ranks if layout.coordinates(rank).pipe == layout.pipeline - 1]
        assert len(first[0]) == STEPS * BATCH // (layout.data * (1 if "data.mask_documents=true" in LAYOUTS[name][1] else 2))
        assert all(hashes == first[0] for hashes in first + last)
        by_replica.append(first[0])
    assert all(not set(a) & set(b) for a, b in pairwise(by_replica))


def test_a_run_equals_one_process_and_leaves_whole_weights(straight: tuple[str, Path, list[Any]], data: Path, tmp_path: Path) -> None:
    """1e-4: six steps of Muon at its full learning rate; test_layouts.py has the tight bound."""
    name, run, results = straight
    masked = [setting for setting in LAYOUTS[name][1] if setting.startswith("data.")]
    alone = run_ranks(TARGET, 1, str(tmp_path / "run"), str(data), [], False, [*SHORT, *masked])[0]
    losses = [loss for _, _, loss, _ in alone["seen"]]
    for rank in results:
        assert rank["code"] == 0
        assert [loss for _, _, loss, _ in rank["seen"]] == pytest.approx(losses, rel=1e-4)
    for file in ("weights.safetensors", "average.safetensors"):
        got, want = (load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / file) for folder in (run, tmp_path / "run"))
        assert {key: tensor.shape for key, tensor in got.items()} == {key: tensor.shape for key, tensor in want.items()}
        assert all((got[key] - want[key]).norm() < 1e-2 * want[key].norm() for key in want)
    mine, other = (json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1]) for folder in (run, tmp_path / "run"))
    assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert mine["tokens"] == other["tokens"]
    totals = [json.loads((folder / "summary.json").read_text())["flops"]["total"] for folder in (run, tmp_path / "run")]
    assert totals[0] == pytest.approx(totals[1], rel=2e-2), "a solve may stop one evaluation earlier or later"


def test_interrupted_and_resumed_is_bit_for_bit_the_same(straight: tuple[str, Path, list[Any]], data: Path, tmp_path: Path) -> None:
    name, _, results = straight
    settings = [*SHORT, *LAYOUTS[name][1]]
    first = run_ranks(TARGET, 4, str(tmp_path / "run"), str(data), [3], False, settings)
    second = run_ranks(TARGET, 4, str(tmp_path / "run"), str(data), [], True, settings)
    for rank in range(4):
        assert first[rank]["code"] == 3
        assert first[rank]["seen"] + second[rank]["seen"] == results[rank]["seen"]
    assert second[0]["weights"] == results[0]["weights"]
