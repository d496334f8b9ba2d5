"""`PuzzleRecipe`: a run on puzzles, as thirteen sections of strictly typed keys. Starts without torch.

Read, layered and overridden as the recipes of language models are (pretrain/config.py); a file says `regime: reasoning`. The sections
`model` and `supervision` are the records of model/reasoning/config.py, `solver` and `gradient` those of model/config.py.
"""

from __future__ import annotations

from dataclasses import replace

import yaml
from pydantic import model_validator

from model.config import GradientConfig, SolverConfig
from model.reasoning.config import ReasonerConfig, ReasoningConfig, SupervisionConfig
from pretrain.draft import accumulation
from pretrain.errors import Refusal
from pretrain.reasoning.sections import (
    PuzzleDataSection,
    PuzzleEvaluationSection,
    PuzzleOptimizerSection,
    PuzzleScheduleSection,
    PuzzleTrainSection,
)
from pretrain.recipe_files import REASONING_REGIME
from pretrain.sections import CheckpointSection, LayoutSection, RunSection, ScheduleSection, Section, TelemetrySection


class PuzzleRecipe(Section):
    """A whole run, resolved and checked. Made by `load_any`, stored as config.yaml, read back by `read_recipe`."""

    run: RunSection = RunSection()
    data: PuzzleDataSection = PuzzleDataSection()
    model: ReasonerConfig = ReasonerConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    solver: SolverConfig = SolverConfig()
    gradient: GradientConfig = GradientConfig()
    train: PuzzleTrainSection
    optimizer: PuzzleOptimizerSection = PuzzleOptimizerSection()
    schedule: PuzzleScheduleSection = PuzzleScheduleSection()
    layout: LayoutSection = LayoutSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: PuzzleEvaluationSection = PuzzleEvaluationSection()
    telemetry: TelemetrySection = TelemetrySection()

    @property
    def architecture(self) -> ReasoningConfig:
        """The four sections `model.reasoning.build` takes."""
        return ReasoningConfig(self.model, self.supervision, self.solver, self.gradient)

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path or URL, weight) of its one set. Raises Refusal when the recipe names none."""
        if self.data.path is None:
            raise Refusal(
                f"data.path is missing in the recipe {self.run.name!r}: prepare puzzles with `attractor data prepare sudoku --out DIR` (or "
                "maze), then add data.path=DIR."
            )
        return [(self.data.path, 1.0)]

    @property
    def learning_rate_schedule(self) -> ScheduleSection:
        """The schedule as a function of the share of the run that is done. A run shorter than its warm-up ends within it."""
        warmup = self.schedule.warmup_steps / self.train.steps
        return ScheduleSection.model_construct(shape=self.schedule.shape, warmup=warmup, final=self.schedule.final)  # above 1 it may be

    @property
    def cells(self) -> int:
        """Of a puzzle; the recipe must be complete."""
        assert self.model.cells is not None
        return self.model.cells

    def completed(self, vocabulary_size: int, cells: int, identifiers: int, path: str) -> PuzzleRecipe:
        """The recipe with what it left open taken from the puzzles prepared at `path`. Raises Refusal where they disagree."""
        for key, wanted, found in (
            ("vocabulary_size", self.model.vocabulary_size, vocabulary_size),
            ("cells", self.model.cells, cells),
        ):
            if wanted is not None and wanted != found:
                raise Refusal(
                    f"model.{key}={wanted} is not that of the puzzles in {path}, which is {found}: set model.{key}=null, so that the data "
                    "decides, or give other data."
                )
        if self.model.identifiers < identifiers:
            raise Refusal(
                f"model.identifiers={self.model.identifiers} is less than the {identifiers} puzzle embeddings that {path} needs: raise it."
            )
        model = replace(self.model, vocabulary_size=vocabulary_size, cells=cells)
        return self.model_copy(update={"model": model})

    def check_world(self, data_ranks: int) -> int:
        """Accumulation: micro-batches a rank takes in each step. Raises Refusal that names legal neighbours when it is not whole."""
        return accumulation(self.train, data_ranks)

    def to_yaml(self) -> str:
        """The fully resolved recipe: its regime, every section, every key, in order."""
        body = {"regime": REASONING_REGIME, **self.model_dump(mode="json")}
        return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)

    @model_validator(mode="after")
    def _combinations(self) -> PuzzleRecipe:
        layout = self.layout
        if layout.tensor > 1 or layout.pipeline > 1 or layout.sequence_parallel or layout.zero > 1:
            raise ValueError(
                "Puzzle models are data parallel with layout.zero 0 or 1: with 7M to 27M parameters there is nothing to cut. Leave out "
                "layout.tensor, layout.pipeline and layout.sequence_parallel, and set layout.zero to 0 or 1."
            )
        if self.train.precision == "bf16" and layout.zero == 0:
            raise ValueError(
                "train.precision=bf16 with layout.zero=0 is refused: there DeepSpeed accumulates and reduces gradients in bf16. Use "
                "layout.zero=1, which costs nothing on one rank, or train.precision=fp32."
            )
        if self.train.compile and self.gradient.jacobian_penalty:
            raise ValueError(
                "train.compile=true cannot be combined with gradient.jacobian_penalty: the penalty is differentiated twice, which "
                "torch.compile does not support. Leave one of them out."
            )
        steps = self.evaluation.steps
        if steps != sorted(set(steps)):
            raise ValueError(f"evaluation.steps={steps} must rise: the steps are taken one after another.")
        _ = self.architecture  # refuses sections that do not go together
        self.check_world(1)
        return self
