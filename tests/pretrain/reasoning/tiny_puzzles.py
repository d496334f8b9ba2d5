"""A tiny set of 4x4 Sudokus and the settings of the runs that several tests train on it."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.puzzles.prepare import prepare_puzzles

TRAINING, VALIDATION = 10, 6
BATCH, STEPS = 4, 12
SETTINGS = [
    "model.kind=trm",
    "model.width=16",
    "model.heads=2",
    "model.layers=1",
    "model.mlp_width=32",
    "model.prefix=2",
    "model.outer_cycles=2",
    "model.inner_cycles=2",
    "model.mixing=attention",
    "model.mixing_width=null",
    "model.positions=rope",
    "supervision.steps=3",
    "supervision.exploration=0.5",
    f"train.steps={STEPS}",
    f"train.global_batch={BATCH}",
    "train.micro_batch=2",
    "train.precision=fp32",
    "train.log_every=1",
    "optimizer.lr=1e-2",
    "optimizer.eps=1e-3",  # larger than rounding, which Adam would else blow up to full steps
    "optimizer.ema=0.9",
    "optimizer.weight_decay=1.0",
    "optimizer.puzzle_lr=1e-2",
    "schedule.warmup_steps=2",
    "layout.zero=0",
    "checkpoint.every=1000",
    "evaluation.every=1000",
    "evaluation.puzzles=null",
    "evaluation.batch=null",
    "evaluation.steps=[1,3]",
]
"""Of the recipe sudoku-demo, all that it may change."""


def tiny_puzzles(folder: Path) -> Path:
    """Prepared in `folder`."""
    prepare_puzzles("sudoku", folder, size=4, puzzles=TRAINING, validation=str(VALIDATION))
    return folder
