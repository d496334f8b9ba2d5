"""Losses by document: which prediction is whose, across windows, and two tiny trained runs against their own logits."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline import open_manifest
from data_pipeline.store import Store
from pretrain import compare, compare_documents
from pretrain.compare import compare_runs
from pretrain.compare_documents import document_losses, newest_checkpoints, number_documents
from pretrain.compare_records import read_run
from pretrain.errors import Refusal
from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import SETTINGS, TARGET


def test_documents_are_numbered_across_windows() -> None:
    """Documents of 3, 1, 8, 2 and 4 ids (the first of each is 0) in windows of 5 ids, two windows a batch; the last is short."""
    lengths = [3, 1, 8, 2, 4]
    row = np.concatenate([[0, *range(10, 9 + length)] for length in lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    windows = [row[at : at + 5] for at in range(0, len(row), 5)]
    before, seen = 0, []
    for pair in (windows[:2], windows[2:]):
        ids = np.zeros((2, 5), np.int64)
        targets = np.full((2, 4), -100)
        for at, window in enumerate(pair):
            ids[at, : len(window)] = window
            targets[at, : len(window) - 1] = window[1:]
        documents = np.cumsum(ids[:, :4] == 0, axis=1, dtype=np.int32)
        numbers, before = number_documents(documents, targets, 0, before)
        seen += numbers[targets >= 0].tolist()
    inputs = [at for at in range(len(row) - 1) if at % 5 < 4]  # every id but the last of a window predicts the next
    assert seen == owner[inputs].tolist()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An Attractor and a Transformer, twenty steps each."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = ("attractor", "transformer")
    with ThreadPoolExecutor(len(kinds)) as threads:
        started = [
            threads.submit(run_ranks, TARGET, 1, str(folder / kind), str(data), [], False, [*SETTINGS, f"model.kind={kind}"])
            for kind in kinds
        ]
    for run in started:
        run.result()
    return [folder / kind for kind in kinds]


def test_trained_runs_by_document(trained: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.evaluate import evaluate_run

    monkeypatch.setattr(compare, "plot_comparison", lambda *_: [])  # most of a comparison's time
    shares: list[float] = []
    document = compare_runs(trained, tmp_path / "out", progress=shares.append)
    documents = document["documents"]
    for run in trained:
        whole = evaluate_run(run)
        told = documents["losses"][run.name]
        assert told["loss"] == pytest.approx(list(whole["loss"].values())[-1], rel=1e-6)
        assert (told["step"], told["depth"]) == (20, list(whole["loss"])[-1])
        assert documents["tokens"] == whole["tokens"]
    assert documents["documents"] == open_manifest(data).splits["validation"].documents
    (pair,) = documents["differences"]
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert document["runs"][0]["seconds"] == pytest.approx(json.loads((trained[0] / "summary.json").read_text())["seconds"], rel=1e-9)
    assert any("few" in said for said in document["findings"])

    def again(*_: Any) -> None:
        raise AssertionError("evaluated twice")

    monkeypatch.setattr(compare_documents, "_evaluate", again)
    assert compare_runs(trained, tmp_path / "out")["documents"] == documents


def test_validation_data_that_cannot_be_read_is_refused_first(trained: list[Path], data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data" / "validation").glob("shard*")).unlink()
    for run in trained:
        shutil.copytree(run, tmp_path / run.name)
        config = tmp_path / run.name / "config.yaml"
        config.write_text(config.read_text().replace(str(data), str(tmp_path / "data")))
    with pytest.raises(Refusal, match="is missing"):
        compare_runs([tmp_path / run.name for run in trained], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_document_losses_are_those_of_the_logits(trained: list[Path], data: Path, tmp_path: Path) -> None:
    from pretrain.loaded import load_run

    (checkpoint,) = newest_checkpoints([read_run(trained[0], "run")])
    found = document_losses(checkpoint, tmp_path, lambda _: None)
    model, store = load_run(trained[0]).model, Store(data, "validation")
    nll, counts, begun = np.zeros(len(found.nll)), np.zeros(len(found.nll), int), 0
    for sample in range(store.samples):
        window = store[sample].astype(np.int64)
        ids = torch.zeros(1, 17, dtype=torch.int64)
        ids[0, : len(window)] = torch.from_numpy(window)
        with torch.no_grad():
            logits = model.logits(ids[:, :-1], depth="auto")
        losses = F.cross_entropy(logits[0], ids[0, 1:], reduction="none").numpy()
        for at in range(len(window)):
            begun += window[at] == 0
            if at + 1 < len(window):
                nll[begun - 1] += losses[at]
                counts[begun - 1] += 1
    assert found.tokens.tolist() == counts.tolist()
    assert np.allclose(found.nll, nll, rtol=1e-3), "a batch of sequences may stop its solve elsewhere than one alone, within the tolerance"
