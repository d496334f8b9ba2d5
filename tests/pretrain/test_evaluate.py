"""Evaluation against the logits themselves: every depth, padding rows and ignored targets left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from data_pipeline import Batch
from model.config import AttractorConfig, BackboneConfig, ModelConfig, SolverConfig
from model.language_model import LanguageModel, build
from model.loss import IGNORE
from pretrain.evaluate import evaluate

DEPTHS = [0, 1, 3, "auto", "strict"]


def tiny(kind: str) -> LanguageModel:
    backbone = BackboneConfig(kind=kind, vocabulary_size=40, width=16, heads=2, backbone_layers=2, zero_output_init=False)  # type: ignore[arg-type]
    solver = SolverConfig(tolerance=1e-3)
    return build(ModelConfig(backbone, AttractorConfig(gate_initial=0.3), solver), seed=3).eval()


def some_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(3):
        rows = torch.randint(40, (4, 13), generator=generator)
        targets = rows[:, 1:].clone()
        targets[0, 5:] = IGNORE
        if number == 2:
            targets[2:] = IGNORE  # rows of padding
        made.append(Batch(rows[:, :-1], targets, torch.zeros_like(targets, dtype=torch.int32), torch.arange(4)))
    return made


@pytest.mark.parametrize("kind", ["attractor", "transformer"])
def test_losses_equal_those_of_the_logits(kind: str) -> None:
    model = tiny(kind)
    report = evaluate(model, some_batches(), DEPTHS, torch.device("cpu"))
    depths = DEPTHS if kind == "attractor" else [0]
    assert list(report["loss"]) == [str(depth) for depth in depths]
    for depth in depths:
        total, count = 0.0, 0
        for batch in some_batches():
            logits = model.logits(batch.tokens, depth=depth)
            total += float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"))
            count += int((batch.targets != IGNORE).sum())
        assert report["loss"][str(depth)] == pytest.approx(total / count, rel=1e-5)
        assert report["perplexity"][str(depth)] == pytest.approx(math.exp(total / count), rel=1e-4)
        assert report["tokens"] == count


def test_solver_numbers_are_means_over_real_sequences() -> None:
    model = tiny("attractor")
    report = evaluate(model, some_batches(), [2, "auto"], torch.device("cpu"))
    assert report["iterations"]["2"] == 2
    taken = []
    for batch in some_batches():
        with torch.no_grad():
            _, record = model(batch.tokens, batch.targets, None, ["auto"])
        real = (batch.targets != IGNORE).any(dim=1)
        taken += record["iterations/auto"][real].tolist()
    assert len(taken) == 10
    assert report["iterations"]["auto"] == pytest.approx(sum(taken) / len(taken))
    assert 0 <= report["converged"] <= 1
    assert report["proposal_distance"] > 0
