"""Log-likelihoods against ten plain lines, whatever the batch: kinds of model, fixed counts, shared inputs, a device that is full."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from model.refine import Depth
from pretrain.downstream.harness_scores import Row, Score, Scorer
from pretrain.loaded import load_run
from tests.pretrain.untrained_runs import write_untrained_run

CPU = torch.device("cpu")
LOOP = ["loop.core=1", "loop.coda=0", "model.backbone_layers=2", "loop.iterations=3"]
KINDS = {
    "attractor": [],
    "mixed over sequences": ["solver.mixing=sequence"],
    "deq from noise": ["model.kind=deq", "solver.start=noise"],
    "parcae": ["model.kind=parcae", *LOOP],
    "looped": ["model.kind=looped", *LOOP],
    "transformer": ["model.kind=transformer"],
}


def rows(count: int = 16) -> list[Row]:
    """Of 2 to 16 inputs; the last four ask for four endings of the same input."""
    draw = random.Random(1)
    found = []
    for _ in range(count - 4):
        ids = [draw.randrange(300) for _ in range(draw.randint(3, 17))]
        scored = draw.randint(1, len(ids) - 1)
        found.append(Row(tuple(ids[:-1]), tuple(ids[-scored:])))
    inputs = tuple(draw.randrange(300) for _ in range(9))
    return [*found, *(Row(inputs, (*inputs[-2:][2 - length :], token)) for length, token in ((0, 5), (0, 7), (1, 9), (2, 11)))]


def plainly(model: object, row: Row, depth: Depth) -> Score:
    """One row by itself, from all its logits."""
    logits = model.logits(torch.tensor([row.inputs]), None, depth)[0]  # type: ignore[attr-defined]
    logs = torch.log_softmax(logits.double(), dim=-1)[-len(row.targets) :]
    wanted = torch.tensor(row.targets)
    return Score(logs[torch.arange(len(wanted)), wanted].sum().item(), bool((logs.argmax(-1) == wanted).all()))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_plain_ones_whatever_the_batch(kind: str, data: Path, tmp_path: Path) -> None:
    model = load_run(write_untrained_run(tmp_path / "run", data, *KINDS[kind])).model
    asked = rows()
    depths: list[Depth] = ["strict"] if kind == "transformer" else ["strict", 2]
    for depth in depths:
        alone = Scorer(model, CPU, depth, batch=1).scores(asked)
        for row, score in zip(asked, alone, strict=True):
            expected = plainly(model, row, depth)
            assert score.logprob == pytest.approx(expected.logprob, rel=1e-6, abs=1e-6)
            assert score.greedy == expected.greedy
        for batch in (3, 8, None):
            order = random.Random(batch or 0).sample(range(len(asked)), len(asked))
            shuffled = Scorer(model, CPU, depth, batch).scores([asked[number] for number in order])
            for number, score in zip(order, shuffled, strict=True):
                assert score.logprob == pytest.approx(alone[number].logprob, rel=2e-6, abs=2e-6)
                assert score.greedy == alone[number].greedy


def test_one_forward_for_requests_that_read_the_same(data: Path, tmp_path: Path) -> None:
    model = load_run(write_untrained_run(tmp_path / "run", data)).model
    read: list[int] = []
    model.backbone.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    told: list[int] = []
    asked = rows()
    Scorer(model, CPU).scores(asked, told.append)
    assert sum(read) == len({row.inputs for row in asked}) == len(asked) - 3
    assert sum(told) == len(asked)


def test_a_batch_without_room_is_halved_until_it_fits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(load_run(write_untrained_run(tmp_path / "run", data)).model, CPU, batch=8)
    asked = rows()
    expected = scorer.scores(asked)
    room, score = 2, scorer._score

    def full(inputs: list[tuple[int, ...]], targets: list[list[tuple[int, ...]]]) -> list[Score]:
        if len(inputs) > room:
            raise torch.OutOfMemoryError("full")
        return score(inputs, targets)

    monkeypatch.setattr(scorer, "_score", full)
    for found, right in zip(scorer.scores(asked), expected, strict=True):
        assert found.logprob == pytest.approx(right.logprob, rel=2e-6)
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        scorer.scores(asked)


def test_logits_in_pieces_are_logits_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(load_run(write_untrained_run(tmp_path / "run", data)).model, CPU)
    expected = scorer.scores(rows())
    monkeypatch.setattr("pretrain.downstream.harness_scores._LOGITS_AT_ONCE", 5 * 320)
    for found, right in zip(scorer.scores(rows()), expected, strict=True):
        assert found == (pytest.approx(right.logprob, rel=1e-6), right.greedy)
