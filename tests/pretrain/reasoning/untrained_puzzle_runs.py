"""Runs on puzzles without training, to test the use of models on: tiny sets, and random weights of any kind in a canonical checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.puzzles.prepare import prepare_puzzles
from model.reasoning.reasoner import build
from pretrain.canonical import Source, write_canonical
from pretrain.config import PuzzleRecipe, load_any
from pretrain.reasoning.run_data import resolve
from pretrain.run_folder import CHECKPOINTS, CONFIG
from pretrain.training_state import TrainingState
from tests.pretrain.reasoning.tiny_puzzles import SETTINGS

STEP, VALIDATION = 3, 9
KINDS = {
    "trm": [],
    "random": ["model.kind=attractor", "model.start=random"],
    "attractor": ["model.kind=attractor", "solver.tolerance=1e-2", "solver.max_iterations=6", "gradient.mode=phantom", "gradient.steps=2"],
    "hrm": ["model.kind=hrm", "supervision.halting=q_learning"],
    "transformer": ["model.kind=transformer", "supervision.steps=1", "evaluation.steps=[1]"],
}
"""Settings of each kind on top of tiny_puzzles'."""


def prepare(game: str, out: Path, *, size: int | None = None, seed: int = 0) -> Path:
    """A tiny set: 4x4 Sudokus or 5x5 mazes, nine of them for validation."""
    size = size or {"sudoku": 4, "maze": 5}[game]
    prepare_puzzles(game, out, size=size, puzzles=12, validation=str(VALIDATION), least=4 if game == "maze" else 0, seed=seed)
    return out


def write_untrained_puzzle_run(run: Path, data: Path, kind: str, *overrides: str) -> Path:
    """A run at step 3 whose weights are random throughout, those that start at zero too."""
    recipe = load_any("sudoku-demo", [*SETTINGS, *KINDS[kind], f"data.path={data}", f"run.dir={run}", *overrides])
    assert isinstance(recipe, PuzzleRecipe)
    recipe = resolve(recipe)
    model = build(recipe.architecture)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    run.mkdir(parents=True)
    (run / CONFIG).write_text(recipe.to_yaml())
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = TrainingState(tokens=STEP, config=recipe.model_dump(mode="json"))
    write_canonical(run / CHECKPOINTS, STEP, state, {"weights": Source(tensors, lambda name: tensors[name])})
    return run
