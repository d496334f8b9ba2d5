"""Run folders without training, to test the use of models on: random weights of any kind of model in one canonical checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from model.language_model import build
from pretrain.canonical import Source, write_canonical
from pretrain.config import load_recipe
from pretrain.run_folder import CHECKPOINTS, CONFIG
from pretrain.training_state import TrainingState
from tests.pretrain.tiny_run import LENGTH, SETTINGS

STEP = 3


def write_untrained_run(run: Path, data: Path, *overrides: str, seed: int = 0) -> Path:
    """A tiny run at step 3 whose weights are random throughout, those that start at zero too."""
    recipe = load_recipe("demo", [*SETTINGS, f"data.path={data}", f"run.dir={run}", "solver.tolerance=1e-4", *overrides])
    model = build(recipe.architecture)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if name.endswith("embedding.weight") else 0.1)
    run.mkdir(parents=True)
    (run / CONFIG).write_text(recipe.to_yaml())
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = TrainingState(tokens=STEP * 4 * LENGTH, config=recipe.model_dump(mode="json"))
    write_canonical(run / CHECKPOINTS, STEP, state, {"weights": Source(tensors, lambda name: tensors[name])})
    return run
