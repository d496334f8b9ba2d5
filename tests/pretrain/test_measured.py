"""What a run was measured to do, from folders whose ledgers are made of known steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from model.cost import Work, training_flops
from pretrain.config import Recipe, load_recipe
from pretrain.errors import Refusal
from pretrain.ledger import Ledger
from pretrain.measured import measured

PARCAE = ["model.kind=parcae", "model.backbone_layers=6"]


def run_folder(path: Path, recipe: Recipe, steps: list[Work], total_steps: int | None = None) -> Path:
    """A run of those steps, as the trainer leaves it."""
    length = recipe.data.sequence_length or 0
    ledger = Ledger(partial(training_flops, recipe.architecture, length, recompute=recipe.train.recompute), length)
    for work in steps:
        ledger.step(4096, work)
    total = ledger.total
    summary = {
        "step": len(steps),
        "total_steps": total_steps or len(steps),
        "tokens": ledger.tokens,
        "flops": {"total": total.hardware, "model": total.model, **asdict(total)},
    }
    path.mkdir()
    (path / "config.yaml").write_text(recipe.to_yaml())
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.mark.parametrize(
    ("overrides", "steps", "mean"),
    [
        (["gradient.mode=one_step"], [Work(16, 1, 0), Work(4, 1, 0), Work(4.5, 1, 0), Work(3.5, 1, 0)], Work(7, 1, 0)),
        (["gradient.mode=adjoint", "train.recompute=true"], [Work(6, 1, 5), Work(5, 1, 4)], Work(5.5, 1, 4.5)),
        (["gradient.mode=neumann", "attractor.injection=cross_attention"], [Work(6, 1, 1), Work(5, 1, 1)], Work(5.5, 1, 1)),
        (["gradient.mode=phantom", "gradient.steps=3", "attractor.injection=concat"], [Work(6, 3, 0)], Work(6, 3, 0)),
        (["model.kind=deq"], [Work(6, 1, 0), Work(8, 1, 0)], Work(7, 1, 0)),
        (PARCAE, [Work(4.25, 3.9, 0), Work(3.75, 3.7, 0)], Work(4, 3.8, 0)),
        (["model.kind=looped", "model.backbone_layers=6"], [Work(0, 8, 0)], Work(0, 8, 0)),
    ],
)
def test_the_mean_over_all_steps_comes_back(tmp_path: Path, overrides: list[str], steps: list[Work], mean: Work) -> None:
    found = measured(run_folder(tmp_path / "run", load_recipe("demo", overrides), steps))
    assert asdict(found.work) == pytest.approx(asdict(mean), abs=1e-8)
    assert found.for_recipe(load_recipe("demo", overrides)) is found.work


@pytest.mark.parametrize(
    ("overrides", "other", "named"),
    [
        ([], ["gradient.mode=adjoint"], r"gradient\.mode=one_step, and the recipe 'demo' has gradient\.mode=adjoint"),
        (PARCAE, [*PARCAE, "loop.backprop=2"], r"loop\.backprop=4.*loop\.backprop=2"),
        (PARCAE, [*PARCAE, "loop.iterations=6"], r"loop\.iterations=8.*loop\.iterations=6"),
    ],
)
def test_work_of_another_gradient_or_loop_is_refused(tmp_path: Path, overrides: list[str], other: list[str], named: str) -> None:
    found = measured(run_folder(tmp_path / "run", load_recipe("demo", overrides), [Work(4, 4, 0)]))
    with pytest.raises(Refusal, match=named):
        found.for_recipe(load_recipe("demo", other))


def test_what_is_no_finished_run_that_iterates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="is no run folder"):
        measured(tmp_path)
    halfway = run_folder(tmp_path / "halfway", load_recipe("demo"), [Work(4, 1, 0)], total_steps=9)
    with pytest.raises(Refusal, match="stands at step 1 of 9"):
        measured(halfway)
    (halfway / "summary.json").unlink()
    with pytest.raises(Refusal, match=r"has no summary\.json"):
        measured(halfway)
    with pytest.raises(Refusal, match="trained a transformer, which iterates nothing"):
        measured(run_folder(tmp_path / "backbone", load_recipe("demo-transformer"), [Work(0, 0, 0)]))
