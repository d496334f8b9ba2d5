"""The probe: the same for a micro-batch of any size, and compared with what a checkpoint kept, those of before included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import probe
from pretrain.checkpoint import Resumed
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.training_state import TrainingState

CPU = torch.device("cpu")
MODE: list[str] = []
ENGINE = SimpleNamespace(eval=lambda: MODE.append("eval"), train=lambda: MODE.append("train"))


@pytest.fixture(autouse=True)
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose loss is a function of the tokens alone."""

    def forward(engine: Any, batches: list[Any], *_: Any, **__: Any) -> list[Any]:
        return [(batch.tokens.double().pow(2).mean(), None, None) for batch in batches]

    monkeypatch.setattr(probe, "forward", forward)
    MODE.clear()


def recipe(micro_batch: int = 4, precision: str = "fp32") -> Recipe:
    sizes = [f"train.micro_batch={micro_batch}", f"train.precision={precision}", "model.vocabulary_size=64", "data.sequence_length=16"]
    return load_recipe("demo", [*sizes, "train.global_batch=8", "data.path=nowhere"])


def take_up(kept: float | None, *, moved: bool = False, precision: str = "fp32") -> None:
    resumed = Resumed(TrainingState(tokens=0, config={}, probe_loss=kept), 7, [], moved)
    probe.refuse_other_probe(ENGINE, recipe(precision=precision), CPU, None, resumed, Path("runs/a/checkpoints"))  # type: ignore[arg-type]


def loss(micro_batch: int = 4, sequences: int = 1) -> float:
    return probe.probe_loss(ENGINE, recipe(micro_batch), CPU, None, sequences=sequences)  # type: ignore[arg-type]


def test_it_does_not_depend_on_the_micro_batch() -> None:
    assert loss(1) == loss(2) == loss(8)
    assert MODE == ["eval", "train"] * 3


def test_what_was_kept_is_compared() -> None:
    take_up(None)
    take_up(loss())
    with pytest.raises(Refusal, match=r"step 7 in runs/a/checkpoints does not come back as it was saved"):
        take_up(loss() * 1.005)
    with pytest.raises(Refusal, match="does not come back"):
        take_up(float("nan"))
    take_up(loss() * 1.005, moved=True, precision="bf16")


def test_a_checkpoint_of_before_kept_the_loss_of_other_sequences() -> None:
    former = loss(sequences=4)
    assert abs(former - loss()) > 1e-2 * former
    take_up(former)
