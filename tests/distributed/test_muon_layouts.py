"""Muon, AdamW, clipping and averages under tensor and pipeline layouts against one process of plain torch, in one launch by world.

Tolerances. fp32, as in test_muon_zero: 1e-5 (2e-7 measured). bf16 with tensor ranks: the reference adds their partial products
where they do, so 1e-5 holds there too (2e-7 measured). bf16 with stages: the two copies of the tied table sum their gradients in
fp32, one process sums them in bf16 (relative 2^-9), which by and by flips the rounding of a weight: 1e-2 (3e-3 measured).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks

BF16: dict[str, Any] = {"stage": 1, "precision": "bf16"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {
        "layout": {"tensor": 2},
        "parity": [
            {"stage": 1, "ema": 0.9},
            {"stage": 1, "name": "adamw"},
            {"stage": 2},
            {"stage": 3, "ema": 0.9, "persistent": True},
            {**BF16, "ema": 0.9},
        ],
        "skipped": [{"stage": 1}, BF16],
    },
    "pipeline 2": {
        "layout": {"pipeline": 2},
        "parity": [{"stage": 1, "ema": 0.9}, {"stage": 1, "name": "adamw"}, {**BF16, "ema": 0.9}],
        "skipped": [{"stage": 1}, BF16],
    },
    "tensor 2, data 2": {
        "layout": {"tensor": 2, "data": 2},
        "parity": [
            *({"stage": stage, "ema": 0.9} for stage in (1, 2, 3)),
            {"stage": 3, "sub_group": 60},
            *({"stage": stage, "precision": "bf16"} for stage in (1, 2, 3)),
        ],
        "skipped": [{"stage": 2}, {"stage": 3}],
    },
    "pipeline 2, data 2": {"layout": {"pipeline": 2, "data": 2}, "parity": [{"stage": 1, "ema": 0.9}, BF16], "skipped": [{"stage": 1}]},
    "pipeline 2, tensor 2": {"layout": {"pipeline": 2, "tensor": 2}, "parity": [{"stage": 1, "ema": 0.9}, BF16], "skipped": [{"stage": 1}]},
}
WIDTH, HIDDEN, STEPS, CLIP = 6, [10, 14, 6], 5, 0.1
"""Of the model in muon_layout_ranks: a backbone block has a matrix [hidden, width] and one [width, hidden]."""
WORLDS = {2: ["tensor 2", "pipeline 2"], 4: ["tensor 2, data 2", "pipeline 2, data 2", "pipeline 2, tensor 2"]}


def launch(world: int) -> dict[str, list[Any]]:
    """By layout, what each rank found."""
    ranks = run_ranks("tests.distributed.muon_layout_ranks:all_cases", world, [LAYOUTS[name] for name in WORLDS[world]])
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(WORLDS[world])}


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[Any]]:
    return launch(2)


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, list[Any]]:
    return launch(4)


@pytest.fixture
def found(name: str, request: pytest.FixtureRequest) -> Any:
    """What each rank found under the layout of that name."""
    return request.getfixturevalue("two_ranks" if name in WORLDS[2] else "four_ranks")[name]


def every(kind: str) -> pytest.MarkDecorator:
    """(layout, number of its case) for every case of a kind."""
    rows = [
        pytest.param(name, index, id=", ".join([name, *(f"{key}={value}" for key, value in case.items())]))
        for name, wanted in LAYOUTS.items()
        for index, case in enumerate(wanted[kind])
    ]
    return pytest.mark.parametrize(("name", "index"), rows)


def stage_of(name: str, rank: int) -> int:
    layout = LAYOUTS[name]["layout"]
    return rank // (layout.get("data", 1) * layout.get("tensor", 1))


def stage_matrices(name: str, stage: int) -> list[list[int]]:
    """Shapes of the backbone's matrices on one stage: blocks 0 and 1 on the first of two, 2 on the last."""
    held = [HIDDEN] if "pipeline" not in LAYOUTS[name]["layout"] else [HIDDEN[:2], HIDDEN[2:]]
    return [shape for hidden in held[stage] for shape in ([hidden, WIDTH], [WIDTH, hidden])]


@every("parity")
def test_five_steps_equal_one_process(found: list[Any], name: str, index: int) -> None:
    case = LAYOUTS[name]["parity"][index]
    bf16 = case.get("precision") == "bf16"
    bound = 1e-2 if bf16 and "pipeline" in name else 1e-5
    for rank in found:
        result = rank["parity"][index]
        assert result["weights"] < bound, result
        assert result["losses"] < bound, result
        assert result["norms"] < bound, result
        assert result["moved"] > 1e-2, "the weights hardly moved, so agreement would say little"
        assert result["smallest_norm"] > CLIP, "clipping was not active"
        if "ema" in case:
            assert result["average"] < (1e-2 if bf16 else 1e-5) < result["apart"]  # the module computes with bf16 copies of the averages
            assert result["restored"]


@every("parity")
def test_each_matrix_is_orthogonalised_whole_and_once_on_its_stage(found: list[Any], name: str, index: int) -> None:
    muon = LAYOUTS[name]["parity"][index].get("name") != "adamw"
    results = [rank["parity"][index] for rank in found]
    for stage in {stage_of(name, rank) for rank in range(len(results))}:
        members = [result for rank, result in enumerate(results) if stage_of(name, rank) == stage]
        matrices = stage_matrices(name, stage) if muon else []
        assert [member["muon_tensors"] for member in members] == [len(matrices)] * len(members)
        done = [member["orthogonalised"] for member in members]
        assert sorted(shape for own in done for shape in own) == sorted(matrices * STEPS)
        assert sum(map(bool, done)) >= min(len(members), len(matrices), 2), "one rank does the work of all"
        elements = sum(rows * columns for rows, columns in matrices)
        assert [member["momentum"] for member in members] == [elements // len(members)] * len(members)


@every("skipped")
def test_a_non_finite_gradient_on_one_rank_is_skipped_on_all(found: list[Any], name: str, index: int) -> None:
    for rank in found:
        assert rank["skipped"][index] == {"applied": False, "finite": False, "unchanged": True, "goes_on": True}


@pytest.mark.parametrize("name", ["tensor 2", "tensor 2, data 2"])
def test_what_is_not_as_expected_is_refused_on_every_rank(found: list[Any], name: str) -> None:
    for rank in found:
        assert "embedding.weight, which every one of the 2 tensor ranks holds whole" in rank["refused"]["whole"]
        assert "the data ranks of pipeline 1 x data" in rank["refused"]["mesh"]
        assert "shards of different matrices" in rank["refused"]["unequal"]
