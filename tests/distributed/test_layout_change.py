"""A run that moves from layout to layout is the run that did not: tensor 2 x pipeline 2 -> one process -> data 2, ZeRO 3 -> tensor 2.

Losses: the state that moves is bit for bit the same, which the chain of engines shows for every layout; what differs from one process is
what differs on any layout (test_layouts.py): the order of sums, and hence a few 1e-7 a step. 1e-5 relative leaves room for eight steps
of AdamW and Muon at rates of 1e-3. bf16 rounds activations to 2^-9, at other places in every layout: 1e-2.
Ranks are started three times, for all kinds of run at once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import BATCH, LENGTH, SETTINGS, prepare_text

pytestmark = pytest.mark.timeout(900)  # real ranks, and a machine may be slow
STEPS, STEP_TOKENS = 8, BATCH * LENGTH
GENTLE = ["optimizer.lr=1e-3", "optimizer.muon_lr=1e-3", "optimizer.eps=1e-6", "evaluation.every=100", "checkpoint.keep=9"]
KINDS = {
    "attractor": [],
    "parcae, adamw, bf16": [
        "train.precision=bf16",
        "optimizer.name=adamw",
        "model.kind=parcae",
        "model.backbone_layers=3",
        "loop.core=1",
        "loop.coda=1",
        "model.value_embeddings=true",
    ],
}
ROUTE = [  # ranks, layout, the step it is stopped at
    (4, ["layout.tensor=2", "layout.pipeline=2"], 2),
    (1, ["train.micro_batch=4"], 4),
    (2, ["layout.zero=3", "train.micro_batch=1"], 6),
    (2, ["layout.tensor=2", "train.recompute=true"], STEPS),
]
CHAIN = [
    {"layout.tensor": 2, "layout.zero": 1},
    {"layout.zero": 0},
    {"layout.pipeline": 2, "layout.zero": 1},
    {"layout.zero": 3, "canonical": ["weights", "average", "optimizer"]},
    {"layout.tensor": 2, "layout.zero": 3, "train.precision": "bf16"},
    {"layout.zero": 2},
    {"layout.pipeline": 2, "layout.zero": 1, "train.precision": "bf16"},
    {"layout.zero": 1, "train.precision": "bf16"},
    {"layout.tensor": 2, "layout.zero": 2, "train.precision": "bf16", "canonical": ["weights", "average", "optimizer"]},
    {"layout.zero": 3, "canonical": ["weights"]},
]
TARGET = "tests.distributed.layout_change_ranks:stage"


def case(folder: Path, data: Path, kind: str, run: str, settings: list[str], stop: int, resume: bool) -> dict[str, Any]:
    places = [f"data.path={data}", f"run.dir={folder / kind.replace(' ', '-') / run}", f"train.tokens={STEPS * STEP_TOKENS}"]
    signalled = {} if stop == STEPS else {"signalled": stop}
    return {"overrides": [*SETTINGS, *GENTLE, *KINDS[kind], *settings, *places], "resume": resume, **signalled}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By kind: what happened in the run of one process and in each part of the one that moved; and the chain."""
    folder = tmp_path_factory.mktemp("moving")
    data = prepare_text(folder / "data")
    parts: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    alone = {}
    for ranks, legs in ((4, ROUTE[:1]), (1, ROUTE[1:2]), (2, ROUTE[2:])):
        cases = [case(folder, data, kind, "moved", legs[0][1], legs[0][2], resume=ranks != 4) for kind in KINDS]
        if ranks == 1:
            cases += [case(folder, data, kind, "alone", [], STEPS, resume=False) for kind in KINDS]
        cases += [case(folder, data, kind, "moved", settings, stop, resume=True) for _, settings, stop in legs[1:] for kind in KINDS]
        told = run_ranks(TARGET, ranks, cases, CHAIN if ranks == 2 else [], str(folder), timeout=600)
        for number, found in enumerate(told[0]["runs"]):
            kind = list(KINDS)[number % len(KINDS)]
            others = [rank["runs"][number] for rank in told]
            if ranks == 1 and number >= len(KINDS):
                alone[kind] = found
            else:
                parts[kind].append((ranks, found, others))
    return {"folder": folder, "parts": parts, "alone": alone, "chain": told[0]["chain"]}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_go_on_and_every_sample_is_seen_once(outcome: dict[str, Any], kind: str) -> None:
    alone, parts = outcome["alone"][kind], outcome["parts"][kind]
    assert [found["code"] for _, found, _ in parts] == [3, 3, 3, 0], [found["message"] for _, found, _ in parts]
    assert alone["code"] == 0
    assert [len(found["steps"]) for _, found, _ in parts] == [2, 2, 2, 2]
    bound = 1e-2 if "bf16" in kind else 1e-5
    steps = [step for _, found, _ in parts for step in found["steps"]]
    for (loss, norm, applied, *_), (want, want_norm, *_) in zip(steps, alone["steps"], strict=True):
        assert applied
        assert loss == pytest.approx(want, rel=bound)
        assert norm == pytest.approx(want_norm, rel=3 * bound)
    wanted = [sorted(step[-1]) for step in alone["steps"]]
    assert [sorted(ids) for ids in _seen(parts)] == wanted
    assert wanted[2] != wanted[0], "nothing was tested"


def _seen(parts: list[Any]) -> list[list[int]]:
    """The samples of every step: of all replicas under data parallelism, else of the first rank, which reads them all."""
    seen = []
    for number, (_, found, others) in enumerate(parts):
        replicas = others if ROUTE[number][1][0] == "layout.zero=3" else [found]
        seen += [[sample for replica in replicas for sample in replica["steps"][step][-1]] for step in range(len(found["steps"]))]
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_record_ledger_and_checkpoints_know_no_break(outcome: dict[str, Any], kind: str) -> None:
    moved, alone = (outcome["folder"] / kind.replace(" ", "-") / run for run in ("moved", "alone"))
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (moved, alone)]
    for mine, other in zip(*records, strict=True):
        assert (mine["step"], mine["tokens"], mine["lr"]) == (other["step"], other["tokens"], other["lr"])
    totals = [json.loads((run / "summary.json").read_text()) for run in (moved, alone)]
    assert totals[0]["tokens"] == totals[1]["tokens"] == STEPS * STEP_TOKENS
    assert totals[0]["flops"]["model"] == pytest.approx(totals[1]["flops"]["model"], rel=2e-2), "a solve may stop one evaluation earlier"
    assert math.isclose(totals[0]["flops"]["total"], sum(record["flops_step"] for record in records[0]), rel_tol=1e-9)
    losses = [json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["loss"] for run in (moved, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "bf16" in kind else 1e-5), "of the moving average, which moved too"
    noted = [start["notes"] for start in json.loads((moved / "run.json").read_text())["starts"]]
    assert noted[0] == []
    assert all("this run has" in notes[-1] for notes in noted[1:]), "each move is in the record"
    layouts = [json.loads(path.read_text())["layout"] for path in sorted(moved.glob("checkpoints/step-*/manifest.json"))]
    assert [(each["pipeline"], each["data"], each["tensor"], each["zero"]) for each in layouts] == [
        (2, 1, 2, 1),
        (1, 1, 1, 1),
        (1, 2, 1, 3),
        (1, 1, 2, 1),
    ]


@pytest.mark.parametrize("index", range(len(CHAIN) - 1), ids=[" ".join(map(str, layout.values())) for layout in CHAIN[:-1]])
def test_every_layout_hands_on_every_bit(outcome: dict[str, Any], index: int) -> None:
    """Weights, AdamW's and Muon's state and the average, read back from each layout's own files by name; twice through a canonical one."""
    first, mine = outcome["chain"][0], outcome["chain"][index]
    assert mine["off"] == 0, "the module computes with what the masters hold"
    assert mine["hashes"] == first["hashes"]
    slots = {name.rpartition("/")[2] for name in first["hashes"]}
    assert slots == {"weight", "step", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema"}


def test_weights_alone_are_taken_over_and_the_optimizer_starts_afresh(outcome: dict[str, Any]) -> None:
    first, last = outcome["chain"][0], outcome["chain"][-1]
    assert last["off"] == 0
    assert last["hashes"] == {name: value for name, value in first["hashes"].items() if name.endswith("/weight")}
