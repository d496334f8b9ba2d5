"""One small model trained for a few seconds on real text, shared by every test that asks how trained maps behave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.language_model import LanguageModel, build
from tests.model.support import text_configuration, train

TRAINED_STEPS = 200


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than half a minute")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny shapes lose time on threads, and bitwise comparisons should not meet a different split of the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained() -> LanguageModel:
    """An Attractor Model (width 64, 2 + 1 blocks) after 200 steps on bytes of English; tests must not change it."""
    model = build(text_configuration(), seed=0)
    torch.set_num_threads(1)
    losses = train(model, 0, TRAINED_STEPS)
    assert sum(losses[-20:]) / 20 < 2.6, "the shared model did not learn: uniform bytes cost 5.5 nats, letter frequencies about 3"
    return model.eval().requires_grad_(False)
