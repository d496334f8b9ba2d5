"""`attractor bench reasoning`: figures that agree with each other, and a checkout that is one. Timings are not under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.commands.bench_reasoning import DEFAULT, chosen
from model.reasoning.config import ReasonerConfig
from model.reasoning.cost import network_flops
from pretrain.reasoning import bench
from pretrain.reasoning.bench_floor import products
from pretrain.reasoning.bench_published import NEEDED

TINY = ["model.width=16", "model.heads=2", "model.layers=1", "model.cells=16", "model.vocabulary_size=6", "model.prefix=2"]
QUICK = ["--seconds", "0", "--batch", "4"]

TRM = """
import torch
from models.losses import WIDTHS

class TinyRecursiveReasoningModel_ACTV1(torch.nn.Module):
    def __init__(self, given):
        super().__init__()
        w, v = given["hidden_size"], given["vocab_size"]
        assert (given["seq_len"], given["puzzle_emb_len"], given["forward_dtype"], given["mlp_t"]) == (16, 2, "float32", False)
        self.tokens = torch.nn.Embedding(v, w)
        self.rest = torch.nn.Parameter(torch.zeros(v * w + 2 * w + 2 + given["L_layers"] * (4 * w * w + 3 * w * WIDTHS)))
        self.puzzle_emb = torch.nn.Module()

    def initial_carry(self, batch):
        return 0

    def forward(self, carry, batch):
        return carry + 1, self.tokens(batch["inputs"]).square().sum() + self.rest.sum()
"""
LOSSES = """
import torch

WIDTHS = 256

class ACTLossHead(torch.nn.Module):
    def __init__(self, model, loss_type):
        super().__init__()
        assert loss_type == "stablemax_cross_entropy"
        self.model = model

    def initial_carry(self, batch):
        return self.model.initial_carry(batch)

    def forward(self, return_keys, carry, batch):
        carry, loss = self.model(carry, batch)
        return carry, loss, {}, None, None
"""
SPARSE = """
class CastedSparseEmbeddingSignSGD_Distributed:
    def __init__(self, buffers, world_size, lr, weight_decay):
        pass

    def step(self):
        pass

    def zero_grad(self):
        pass
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "reasoning", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def check(row: dict[str, Any]) -> None:
    assert row["flops_per_second"] == pytest.approx(row["flops_per_step"] * row["steps_per_second"])
    assert row["puzzles_per_second"] == pytest.approx(4 * row["steps_per_second"])
    assert row["steps_per_second"] == pytest.approx(1 / row["step_seconds"])
    assert min(row["memory_bytes"], row["floor_seconds"], row["floor_cpu_seconds"]) > 0
    assert row["repetitions"] >= 3


def test_rows_of_several_kinds_agree_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_apart", bench._row)  # in this process: starting others takes seconds
    words = ["sudoku-trm-7m", "sudoku-attractor-7m", "sudoku-hrm-27m", "sudoku-transformer-27m", "train.precision=fp32"]
    result = run(*words, *TINY, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["kind"] for row in rows] == ["trm", "attractor", "hrm", "transformer"]
    for row in rows:
        check(row)
        assert "published" not in row
    trm, attractor, hrm, direct = rows
    assert (trm["evaluations"], trm["applications"], trm["solver_iterations"]) == (14, 7, 0)
    assert (hrm["applications"], direct["evaluations"], direct["applications"]) == (2, 0, 1)
    assert attractor["solver_iterations"] >= 4  # the recipe's least
    assert attractor["evaluations"] >= 3 * attractor["solver_iterations"]  # three cycles, and what follows their solves


def test_published_code_takes_turns_with_a_trm(tmp_path: Path) -> None:
    for name, text in zip(NEEDED, (TRM, LOSSES, SPARSE), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    result = run("sudoku-trm-7m", "train.precision=fp32", *TINY, *QUICK, "--against", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)
    check(row)
    published = row["published"]
    assert published["over_ours"] == pytest.approx(published["step_seconds"] / row["step_seconds"])
    assert published["evaluation_over_ours"] == pytest.approx(published["evaluation_step_seconds"] / row["evaluation_step_seconds"])
    assert "AdamATan2 by AdamW" in published["replaced"]


def test_tables_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_apart", bench._row)
    shown = run("sudoku-transformer-27m", "train.precision=bf16", *TINY, *QUICK)
    assert shown.exit_code == 0, shown.stderr
    assert "transformer-27m" in shown.stdout
    assert "…" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--against", "."], "is no checkout of the published TRM code: it lacks models/recursive_reasoning/trm.py"),
        (["sudoku-hrm-27m", "--against", "."], "none of these recipes is one"),
        (["demo"], "is of a language model"),
    ],
)
def test_refusals(words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())


def test_by_default_the_published_sizes() -> None:
    recipes = chosen(["train.compile=true"])
    assert [recipe.run.name for recipe in recipes] == list(DEFAULT)
    assert all(recipe.train.compile and recipe.model.width == 512 for recipe in recipes)


@pytest.mark.parametrize("mixing", ["attention", "mlp"])
def test_the_floor_has_the_products_of_a_block_and_no_others(mixing: Any) -> None:
    config = ReasonerConfig(cells=81, layers=3, mixing=mixing, positions="none")
    flops = sum(2 * many * m * k * n for many, m, k, n in products(config, rows=5))
    assert 3 * flops == 5 * sum(network_flops(config))
