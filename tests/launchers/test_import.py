"""`attractor import` at the command line: what it shows, its document, and refusals that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from launchers.cli import app
from tests.pretrain.hub.published_models import configuration, random_state, write_model
from tests.pretrain.tiny_run import prepare_text


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["import", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture
def published(tmp_path: Path) -> Path:
    config = configuration("parcae", vocab_size=300, padded_vocab_size=320)
    return write_model(tmp_path / "parcae-tiny", config, random_state(config), "pytorch_model.bin")


def test_one_document_and_nothing_else(tmp_path: Path, published: Path) -> None:
    result = run(str(published), "--out", str(tmp_path / "run"), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["kind"], report["vocabulary_size"], report["sequence_length"]) == ("parcae", 320, 24)
    assert (report["tokenizer"], report["data"]) == (False, None)


def test_what_it_shows_and_what_comes_next(tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run("parcae-tiny", "--out", "run", "--data", str(data), "--tokenizer", str(data / "tokenizer.json"))
    assert result.exit_code == 0, result.stderr
    assert "trained on sequences of 24 tokens; the run takes 16" in result.stderr
    shown = " ".join(result.stdout.split())
    held = torch.load(published / "pytorch_model.bin", weights_only=True)
    parameters = sum(tensor.numel() for name, tensor in held.items() if name not in ("lm_head.weight", "freqs_cis"))
    assert f"parcae, {parameters:,} parameters" in shown
    assert "attractor evaluate run" in shown
    assert max(map(len, result.stdout.splitlines())) <= 80
    evaluated = CliRunner().invoke(app, ["evaluate", "run", "--json"])
    assert evaluated.exit_code == 0, evaluated.stderr
    assert list(json.loads(evaluated.stdout)["loss"]) == ["1", "2", "4", "16", "auto"]


def test_a_refusal_is_one_paragraph_and_leaves_nothing(tmp_path: Path, published: Path) -> None:
    state = torch.load(published / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "transformer.extra": torch.zeros(2)}, published / "pytorch_model.bin")
    result = run(str(published), "--out", str(tmp_path / "run"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "transformer.extra" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["parcae-tiny"]
    assert run(str(published)).exit_code == 2  # --out is missing


def test_a_run_of_ours_needs_no_import(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("regime: reasoning\n")
    result = run(str(tmp_path / "run"), "--out", str(tmp_path / "other"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "holds a run of `attractor train`" in result.stderr
    assert not (tmp_path / "other").exists()
