"""Bits per byte against the logits themselves; what stands for no text is left out, loss and all; no tokenizer, no figure."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from data_pipeline import Batch, open_manifest, open_tokenizer
from model.config import BackboneConfig, ModelConfig
from model.language_model import LanguageModel, build
from model.loss import IGNORE
from pretrain.config import Recipe, load_recipe
from pretrain.evaluate import evaluate, text_bytes_of, validation_loader
from tests.data_pipeline.sets import random_documents, write_set
from tests.pretrain.tiny_run import SETTINGS

CPU = torch.device("cpu")
DEPTHS: list[int | str] = [0, 1, 3, "auto"]
SIZES = torch.tensor([0, *(1 + number % 4 for number in range(38)), 0], dtype=torch.int32)


def tiny(kind: str) -> LanguageModel:
    backbone = BackboneConfig(kind=kind, vocabulary_size=40, width=16, heads=2, backbone_layers=2, zero_output_init=False)  # type: ignore[arg-type]
    return build(ModelConfig(backbone), seed=3).eval()


def some_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(3):
        rows = torch.randint(40, (4, 13), generator=generator)
        rows[:, 4] = 0  # a document begins
        targets = rows[:, 1:].clone()
        targets[0, 5:] = IGNORE
        if number == 2:
            targets[2:] = IGNORE
        made.append(Batch(rows[:, :-1], targets, torch.zeros_like(targets, dtype=torch.int32), torch.arange(4)))
    return made


@pytest.mark.parametrize("kind", ["attractor", "transformer"])
def test_equals_what_the_logits_say(kind: str) -> None:
    model = tiny(kind)
    report = evaluate(model, some_batches(), DEPTHS, CPU, text_bytes=SIZES)
    assert list(report["bits_per_byte"]) == list(report["loss"])
    for depth in report["loss"]:
        nats, size = 0.0, 0
        for batch in some_batches():
            logits = model.logits(batch.tokens, depth="auto" if depth == "auto" else int(depth))
            for row, targets in zip(logits, batch.targets, strict=True):
                for at, target in zip(row, targets.tolist(), strict=True):
                    if target != IGNORE and SIZES[target]:
                        nats -= float(F.log_softmax(at, -1)[target])
                        size += int(SIZES[target])
        assert report["bits_per_byte"][depth] == pytest.approx(nats / (math.log(2) * size), rel=1e-5)


def test_twice_the_bytes_halve_it_and_the_loss_of_separators_is_left_out() -> None:
    class Fixed(torch.nn.Module):
        """Costs ln 2 a token of text, and much where a document begins."""

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            nll = torch.where(targets == 0, 1000.0, math.log(2)) * (targets != IGNORE)
            return nll.mean(), {"nll/0": nll}

    size = torch.full((40,), 4, dtype=torch.int32)
    size[0] = 0
    assert evaluate(Fixed(), some_batches(), [0], CPU, text_bytes=size)["bits_per_byte"]["0"] == pytest.approx(0.25)
    assert evaluate(Fixed(), some_batches(), [0], CPU, text_bytes=2 * size)["bits_per_byte"]["0"] == pytest.approx(0.125)


def test_absent_where_bytes_are_not_known() -> None:
    assert "bits_per_byte" not in evaluate(tiny("transformer"), some_batches(), [0], CPU)
    assert "bits_per_byte" not in evaluate(tiny("transformer"), some_batches(), [0], CPU, text_bytes=torch.zeros(40, dtype=torch.int32))


def recipe_for(data: Path) -> Recipe:
    return load_recipe("demo", [*SETTINGS, f"data.path={data}", "run.dir=unused"])


def test_a_prepared_set_tells_the_bytes_of_its_tokens(data: Path) -> None:
    """The bytes of all targets are those of the text that decoding them gives."""
    sizes = text_bytes_of(recipe_for(data), CPU)
    assert sizes is not None
    assert len(sizes) == 320  # the model's vocabulary, larger than the tokenizer's
    tokenizer, bos = open_tokenizer(data), open_manifest(data).bos_id
    counted, decoded = 0, 0
    for batch in validation_loader(recipe_for(data), 0, 1, None):
        for targets in batch.targets:
            ids = [number for number in targets.tolist() if number not in (IGNORE, bos)]
            counted += int(sizes[ids].sum())
            decoded += len(tokenizer.decode(ids, skip_special_tokens=False).encode())
    assert counted == decoded > 0


def test_a_set_whose_tokenizer_does_not_tell_gives_a_warning_and_no_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path / "set", random_documents(20))
    with caplog.at_level(logging.WARNING):
        assert text_bytes_of(recipe_for(folder), CPU) is None
    assert "no bits per byte" in caplog.text
    assert str(folder) in caplog.text
