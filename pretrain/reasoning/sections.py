"""The sections of a puzzle recipe that are not the model's, and its schema of keys. No torch.

Defaults are the published ones (TRM, arXiv 2510.04871, and the Attractor reasoner of arXiv 2605.12466's code) where those exist: AdamW with
a decay of 1.0 on everything, a warm-up of 2,000 steps and a constant rate after it, batch 768, an average of the weights of .999.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model.config import GradientConfig, SolverConfig
from model.reasoning.config import ReasonerConfig, SupervisionConfig
from pretrain import sections
from pretrain.keys import Schema
from pretrain.sections import Fraction, NonNegative, Positive, Section, SharedTrainSection


class PuzzleDataSection(Section):
    path: str | None = None
    """A folder or URL that `attractor data prepare sudoku|maze` wrote."""
    augment: bool = True
    """Draw a new symmetry of every puzzle in every epoch: see docs/puzzles.md."""
    cache: str | None = None
    """Local folder for the shards of a remote set."""


class PuzzleTrainSection(SharedTrainSection):
    steps: Positive
    """Optimizer steps of the whole run; each is one supervision step of global_batch puzzles."""
    global_batch: Positive = 768
    """Puzzles under way at a time, over all data ranks and accumulation."""
    micro_batch: Positive = 768
    """Puzzles a rank takes through one forward and backward."""


class PuzzleOptimizerSection(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's learning rate, of everything but the puzzle embeddings."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's, beside the root of the second moment."""
    weight_decay: NonNegative = 1.0
    """AdamW's decay, of every parameter (published)."""
    puzzle_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Of the puzzle embeddings: p <- p (1 - lr decay) - lr sign(g), where g is not 0."""
    puzzle_weight_decay: NonNegative = 1.0
    """Theirs."""
    clip: NonNegative = 0.0
    """Bound on the global gradient norm; 0 (published) leaves it unbounded."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    """Decay of the average of the weights that is evaluated; null keeps none."""


class PuzzleScheduleSection(Section):
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps over which the rate rises linearly from 0."""
    shape: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    final: Fraction = 1.0
    """Cosine: rate at the end over the peak rate."""


class PuzzleEvaluationSection(Section):
    every: Positive = 5000
    """Steps between evaluations; the last step always has one."""
    puzzles: Positive | None = None
    """Validation puzzles at most; null takes all."""
    batch: Positive | None = None
    """Puzzles at a time; null takes train.micro_batch."""
    steps: list[Positive] = Field(default=[1, 4, 16], min_length=1)
    """Supervision steps after which the answers are compared; the last is how the model is used."""


REASONING = Schema(
    {
        "run": sections.RunSection,
        "data": PuzzleDataSection,
        "model": ReasonerConfig,
        "supervision": SupervisionConfig,
        "solver": SolverConfig,
        "gradient": GradientConfig,
        "train": PuzzleTrainSection,
        "optimizer": PuzzleOptimizerSection,
        "schedule": PuzzleScheduleSection,
        "layout": sections.LayoutSection,
        "checkpoint": sections.CheckpointSection,
        "evaluation": PuzzleEvaluationSection,
        "telemetry": sections.TelemetrySection,
    },
    {
        "data.path": "the folder of a set of puzzles that `attractor data prepare sudoku` or `maze` wrote",
        "evaluation.steps": "a list of supervision steps such as [1, 4, 16]",
        "optimizer.betas": "two numbers from 0 to below 1, such as [0.9, 0.95]",
        "train.steps": "a number of optimizer steps such as 65_000",
    },
    budget="train.steps",
)
"""Of puzzles."""
