"""The ledger against an independent sum, and the peaks it looks up."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import pytest

from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig
from model.cost import Work, training_flops
from pretrain.ledger import Ledger, peak_flops

CONFIG = ModelConfig(
    BackboneConfig(vocabulary_size=100, width=8, heads=2, backbone_layers=3), AttractorConfig(layers=2), gradient=GradientConfig()
)
S = 16


def new_ledger() -> Ledger:
    return Ledger(partial(training_flops, CONFIG, S), S)


def by_hand(evaluations: float) -> dict[str, float]:
    """FLOPs a token written out for this one model: 12 w^2 a block in matrices, 4 s w in attention."""
    matrices, attention, head = 2 * 12 * 64, 4 * S * 8, 2 * 100 * 8
    block = matrices + attention
    return {
        "head_forward": head,
        "head_backward": 2 * head,
        "backbone_forward": 3 * block,
        "backbone_backward": 6 * block,
        "solve": evaluations * 2 * block,
        "application": 2 * block,
        "implicit_backward": 4 * block,
        "recomputation": 0.5 * 5 * attention,
    }


def test_a_run_is_the_sum_of_its_steps() -> None:
    ledger = new_ledger()
    steps = [(64, 3.0), (64, 5.5), (32, 1.0)]
    for tokens, evaluations in steps:
        spent = ledger.step(tokens, Work(evaluations, 1.0, 0.0))
        assert asdict(spent) == pytest.approx({part: tokens * value for part, value in by_hand(evaluations).items()})
    for part, value in asdict(ledger.total).items():
        assert value == pytest.approx(sum(tokens * by_hand(evaluations)[part] for tokens, evaluations in steps))
    assert ledger.tokens == 160
    assert ledger.evaluations == pytest.approx(sum(tokens / S * evaluations for tokens, evaluations in steps))


def test_model_flops_leave_recomputation_out() -> None:
    spent = new_ledger().step(10, Work(2.0, 1.0, 0.0))
    assert spent.hardware - spent.model == spent.recomputation > 0


def test_state_goes_on_where_it_was() -> None:
    straight, first = new_ledger(), new_ledger()
    for ledger in (straight, first):
        ledger.step(64, Work(2.5, 1.0, 0.0))
    second = new_ledger()
    second.load_state_dict(first.state_dict())
    for ledger in (straight, second):
        ledger.step(64, Work(4.0, 1.0, 0.0))
    assert second.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("Some CPU", "bf16", None),
    ],
)
def test_peaks(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak


def test_a_device_without_bf16_has_no_bf16_peak() -> None:
    assert peak_flops("Tesla V100-SXM2", "bf16") is None
