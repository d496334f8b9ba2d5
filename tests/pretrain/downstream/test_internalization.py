"""The internalization report against a recomputation from whole logits; its groups by hand; what each kind of model is reported by."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.fixed_point import token_residual
from model.loss import IGNORE
from model.strict import solve_strict
from pretrain.downstream.internalization import PICTURE, REPORT, by_frequency, by_position, report_internalization
from pretrain.errors import Refusal
from pretrain.evaluate import validation_loader
from pretrain.loaded import load_run
from tests.pretrain.untrained_runs import write_untrained_run


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("untrained") / "run", data)


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return report_internalization(run, run)


def everything(run: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(model, tokens, targets) of the whole validation split in one batch, without padding rows."""
    loaded = load_run(run)
    batches = list(validation_loader(loaded.recipe, 0, 1, None))
    tokens, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets"))
    real = (targets != IGNORE).any(dim=1)
    return loaded.model, tokens[real], targets[real]


def test_figures_by_depth_are_those_of_whole_logits(run: Path, report: dict[str, Any]) -> None:
    model, tokens, targets = everything(run)
    predicted = targets != IGNORE
    logs = {str(depth): torch.log_softmax(model.logits(tokens, None, depth)[predicted], dim=-1) for depth in (0, 1, 2, 4)}
    logs["auto"] = torch.log_softmax(model.logits(tokens, None, "strict")[predicted], dim=-1)
    assert report["tokens"] == predicted.sum()
    assert report["sequences"] == len(tokens)
    assert list(report["loss"]) == list(logs)
    for depth, log in logs.items():
        top, final = log.argmax(-1), logs["auto"]
        assert report["loss"][depth] == pytest.approx(-log.gather(-1, targets[predicted][:, None]).mean().item(), rel=1e-4)
        assert report["accuracy"][depth] == pytest.approx((top == targets[predicted]).float().mean().item(), abs=1e-6)
        assert report["agreement"][depth] == pytest.approx((top == final.argmax(-1)).float().mean().item(), abs=1e-6)
        assert report["divergence"][depth] == pytest.approx((final.exp() * (final - log)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert report["agreement"]["auto"] == 1
    assert 0 < report["agreement"]["0"] < report["agreement"]["4"]
    with torch.no_grad():
        proposal, context = model.propose(tokens, None)
        state = model.refine(proposal, context, "strict").output
    distances = (state - proposal).flatten(1).norm(dim=1) / proposal.flatten(1).norm(dim=1)
    assert report["proposal_distance"] == pytest.approx(distances.mean().item(), rel=1e-4)


def iterations_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token: solves that are cut short after 1, 2, ... evaluations, and the residual of the last."""
    solver = model.refine.solver
    with torch.no_grad():
        y0, context = model.propose(tokens, None)
        found = torch.zeros_like(tokens)
        for taken in range(1, 40):
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []

            def f(y: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]] = seen) -> torch.Tensor:
                value = model.refine.attractor(y, y0, context)
                seen.append((y, value))
                return value

            solve_strict(f, y0, replace(solver, max_iterations=taken))
            y, value = seen[-1]
            found[(found == 0) & (token_residual(value - y, y) < solver.tolerance)] = taken
    assert (found > 0).all()
    return found


def test_iterations_by_position_and_by_frequency(run: Path, report: dict[str, Any]) -> None:
    model, tokens, targets = everything(run)
    predicted, iterations = targets != IGNORE, iterations_of(model, tokens)
    assert report["iterations"] == pytest.approx(iterations[predicted].double().mean().item())
    assert report["converged"] == 1
    assert [(group["first"], group["last"]) for group in report["by_position"]] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    for group in report["by_position"]:
        part = slice(group["first"], group["last"] + 1)
        assert group["iterations"] == pytest.approx(iterations[:, part][predicted[:, part]].double().mean().item())
        assert group["tokens"] == predicted[:, part].sum()
    assert min(group["iterations"] for group in report["by_position"]) < max(group["iterations"] for group in report["by_position"])

    counts = Counter(tokens[predicted].tolist())
    groups = report["by_frequency"]
    assert sum(group["tokens"] for group in groups) == report["tokens"]
    assert sum(group["entries"] for group in groups) == len(counts)
    rarest = groups[-1]
    ids = torch.tensor(sorted(counts, key=lambda token: (-counts[token], token))[-rarest["entries"] :])
    chosen = predicted & torch.isin(tokens, ids)
    assert rarest["tokens"] == chosen.sum()
    assert rarest["iterations"] == pytest.approx(iterations[chosen].double().mean().item())


def test_groups_by_hand() -> None:
    def sums(tokens: list[int]) -> dict[str, torch.Tensor]:
        count = torch.tensor(tokens, dtype=torch.float64)
        return {"tokens": count, "iterations": 2 * count, "agreement/0": count / 2, "loss/0": 3 * count, "loss/auto": count}

    parts = by_frequency(sums([0, 50, 1, 20, 10, 10, 5, 4]))
    assert [(part["part"], part["entries"], part["tokens"], part["rarest_count"]) for part in parts] == [
        (3, 1, 50, 50),
        (7, 1, 20, 20),
        (8, 1, 10, 10),
        (9, 1, 10, 10),
        (10, 3, 10, 1),
    ]
    assert {(part["iterations"], part["agreement"], part["loss_0"], part["loss_auto"]) for part in parts} == {(2, 0.5, 3, 1)}
    ranges = by_position(sums([1, 1, 1, 0, 0, 0]))
    assert [(part["first"], part["last"], part["tokens"]) for part in ranges] == [(0, 0, 1), (1, 1, 1), (2, 3, 1)]


def test_it_is_kept_and_drawn(run: Path, report: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((run / REPORT).read_text()) == report
    assert (run / PICTURE).read_bytes().startswith(b"\x89PNG")
    told: list[float] = []
    few = report_internalization(run, tmp_path / "out", (1,), 2, progress=told.append)
    assert few["files"] == [str(tmp_path / "out" / REPORT), str(tmp_path / "out" / PICTURE)]
    assert (few["sequences"], list(few["loss"])) == (2, ["0", "1", "auto"])
    assert told[-1] == 1


LOOP = ["loop.core=1", "loop.coda=0", "model.backbone_layers=2", "loop.iterations=3"]


def test_other_kinds(data: Path, tmp_path: Path) -> None:
    deq = report_internalization(write_untrained_run(tmp_path / "deq", data, "model.kind=deq"), tmp_path / "deq", limit=4)
    assert "by_position" in deq
    assert "proposal_distance" not in deq
    loop = report_internalization(write_untrained_run(tmp_path / "loop", data, "model.kind=parcae", *LOOP), tmp_path / "loop", (3,), 4)
    assert not {"by_position", "iterations", "proposal_distance"} & loop.keys()
    assert loop["agreement"]["auto"] == 1
    assert loop["loss"]["auto"] == loop["loss"]["3"] != loop["loss"]["0"]
    run = write_untrained_run(tmp_path / "transformer", data, "model.kind=transformer")
    with pytest.raises(Refusal, match="nothing to internalise"):
        report_internalization(run, run)
    assert not (run / REPORT).exists()
