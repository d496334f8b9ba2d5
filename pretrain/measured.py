"""What a finished run was measured to do, a sequence: evaluations of f, applications, vector-Jacobian products. No torch.

The ledger in summary.json is the sum over all steps, so the mean over the run follows from it exactly, where metrics.jsonl has
the logged steps alone. FLOPs by part are linear in the work:

    evaluations = (solve a token) / (solve a token at one evaluation), and so on part by part

The means carry over to another recipe of the same kind and loop, or of the same map, solver and gradient: those decide how much of the
work there is. Width, depth and data decide too, within limits that a user must judge.
Refused: a folder that holds no finished run, a run of a model that iterates nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from model.config import SolverConfig
from model.cost import Flops, Work, training_flops
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.run_folder import CONFIG, SUMMARY

_UNLIKE = ("expected_iterations", "compaction")
"""Keys of the solver that change no number of evaluations."""
_LOOP = ("model.kind", "loop.iterations", "loop.backprop")
_SOLVED = (
    "model.kind",
    *(f"gradient.{key}" for key in ("mode", "steps", "tolerance", "max_iterations")),
    "attractor.injection",
    *(f"solver.{field.name}" for field in fields(SolverConfig) if field.name not in _UNLIKE),
)


@dataclass(frozen=True)
class Measured:
    """The mean work of a run."""

    run: Path
    recipe: Recipe
    work: Work

    def for_recipe(self, other: Recipe) -> Work:
        """The work, for another recipe of that kind. Raises Refusal where the other's sections say that it does other work."""
        for dotted in _LOOP if other.model.loops else _SOLVED:
            section, _, key = dotted.partition(".")
            own, its = (getattr(getattr(recipe, section), key) for recipe in (self.recipe, other))
            if own != its:
                raise Refusal(
                    f"The run {self.run} was measured with {dotted}={own}, and the recipe {other.run.name!r} has {dotted}={its}: its work "
                    "would be another. Measure a run with the same, or state --iterations."
                )
        return self.work


def measured(run: Path) -> Measured:
    """Mean evaluations, applications and products a sequence of a finished run, from its config.yaml and summary.json."""
    if not (run / CONFIG).is_file():
        raise Refusal(f"{run} is no run folder: it has no {CONFIG}. Give the folder that run.dir named.")
    recipe = Recipe.from_yaml((run / CONFIG).read_text(encoding="utf-8"), str(run / CONFIG))
    if not (recipe.model.solves or recipe.model.loops):
        raise Refusal(f"The run {run} trained a {recipe.model.kind}, which iterates nothing: there is nothing to take from it.")
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8")) if (run / SUMMARY).is_file() else {}
    if "step" not in summary or summary["step"] != summary["total_steps"]:
        stands = f"stands at step {summary['step']} of {summary['total_steps']}" if "step" in summary else f"has no {SUMMARY}"
        raise Refusal(
            f"The run {run} is not finished: it {stands}, and iterations change while a model trains. Finish it with "
            f"`attractor train ... --resume`, or state --iterations."
        )
    parts = {name: value / summary["tokens"] for name, value in summary["flops"].items()}
    one = _token(recipe, Work(1.0, 1.0, 0.0))
    product = _token(recipe, Work(0.0, 0.0, 1.0)).implicit_backward
    applications = parts["application"] / one.application
    evaluations = parts["solve"] / one.solve
    products = (parts["implicit_backward"] - applications * one.implicit_backward) / product
    return Measured(run, recipe, Work(*(round(count, 9) for count in (evaluations, applications, products))))  # 1, not 1 + 2e-16


def _token(recipe: Recipe, work: Work) -> Flops:
    assert recipe.data.sequence_length is not None  # a run's recipe is complete
    return training_flops(recipe.architecture, recipe.data.sequence_length, work)
