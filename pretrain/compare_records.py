"""A finished or unfinished run as its folder tells it, for comparisons. Reads files only: no torch, nothing is written.

    config.yaml, metrics.jsonl, evaluations.jsonl, run.json, summary.json, and the manifest of the data it was validated on

What a run reached is what its last record says: a run that was killed has no summary, or an old one. Seconds are those of
training steps (step_seconds of a record times its steps), without evaluation, checkpoints, and work that was lost and done again.
Refused: a folder that holds no run, a run without a record of its loss, data whose manifest is not there.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import Manifest, open_manifest
from data_pipeline.manifest import VALIDATION, Split
from model.cost import count_parameters
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.run_folder import CONFIG, EVALUATIONS, METRICS, STARTS, SUMMARY

AXES = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Curve:
    """A loss over training: arrays [n] in the order of training. flops are hardware FLOPs so far, seconds those of steps so far."""

    tokens: NDArray[np.float64]
    flops: NDArray[np.float64]
    seconds: NDArray[np.float64]
    loss: NDArray[np.float64]

    def spent(self, index: int) -> dict[str, float]:
        """Tokens, FLOPs and seconds at one point."""
        return {axis: float(getattr(self, axis)[index]) for axis in AXES}


@dataclass(frozen=True)
class Records:
    """What the folder of a run of any regime tells of what was spent. `name` is what the comparison calls it."""

    path: Path
    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def step(self) -> int:
        """Of the last record."""
        return int(self.metrics[-1]["step"])

    @cached_property
    def ledger(self) -> tuple[NDArray, NDArray, NDArray]:
        """Tokens, hardware FLOPs and seconds so far at every record of metrics.jsonl."""
        tokens, flops = (np.array([record[key] for record in self.metrics], float) for key in ("tokens", "flops_total"))
        return tokens, flops, np.cumsum(self._steps * np.array([record["step_seconds"] for record in self.metrics], float))

    def spent_at(self, tokens: NDArray) -> tuple[NDArray, NDArray]:
        """Hardware FLOPs and seconds when so many tokens had been trained on; between two records interpolated by tokens."""
        known, flops, seconds = self.ledger
        return _along(known, flops, tokens), _along(known, seconds, tokens)

    @property
    def seconds(self) -> float:
        """Of training steps, up to the last record."""
        return float(self.ledger[2][-1])

    @property
    def _steps(self) -> NDArray:
        """Steps each record stands for."""
        return np.diff([0, *(record["step"] for record in self.metrics)]).astype(float)

    def flops(self) -> dict[str, float]:
        """Hardware FLOPs, and model FLOPs: those without what backward computed again.

        Exact where the summary is of the last record; else what was computed again is that of the recorded steps, times theirs.
        """
        hardware = float(self.metrics[-1]["flops_total"])
        if self.summary.get("step") == self.step:
            return {"hardware": hardware, "model": float(self.summary["flops"]["model"])}
        again = np.array([record["flops_parts"]["recomputation"] for record in self.metrics])
        return {"hardware": hardware, "model": hardware - float(np.sum(again * self._steps))}

    def series(self, key: str) -> tuple[NDArray, NDArray]:
        """(tokens, value) of a key of metrics.jsonl, where it is recorded."""
        told = [(record["tokens"], record[key]) for record in self.metrics if _finite(record.get(key))]
        return np.array([at for at, _ in told], float), np.array([value for _, value in told], float)


@dataclass(frozen=True)
class RunRecord(Records):
    """One language model's run."""

    recipe: Recipe
    manifest: Manifest

    @property
    def total_steps(self) -> int:
        """That the token budget pays for."""
        return self.recipe.steps(self.sequence_length)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def sequence_length(self) -> int:
        return self.recipe.data.sequence_length or self.manifest.sequence_length

    @property
    def validation_split(self) -> Split:
        return self.manifest.splits[VALIDATION]

    @property
    def own_depth(self) -> int | str:
        """The depth at which the model is used: auto where the recipe lists it, else the last one listed."""
        depths = self.recipe.evaluation.iterations
        return "auto" if "auto" in depths else depths[-1]

    @cached_property
    def training(self) -> Curve:
        """The recorded losses of steps; steps that were skipped have none."""
        finite = np.array([_finite(record["loss"]) for record in self.metrics])
        tokens, flops, seconds = self.ledger
        losses = np.array([record["loss"] for record, use in zip(self.metrics, finite, strict=True) if use], float)
        return Curve(tokens[finite], flops[finite], seconds[finite], losses)

    @cached_property
    def validation(self) -> Curve:
        """Validation losses at the run's own depth."""
        told = [(record["tokens"], own_loss(record)) for record in self.evaluations]
        tokens = np.array([at for at, loss in told if _finite(loss)], float)
        return Curve(tokens, *self.spent_at(tokens), np.array([loss for _, loss in told if _finite(loss)], float))

    def parameters(self) -> dict[str, int]:
        """By kind, in closed form from the recipe."""
        return asdict(count_parameters(self.recipe.architecture))

    def layout(self) -> dict[str, Any]:
        """The recipe's, with the data ranks of the last summary (None: none was written)."""
        data = self.summary.get("layout", {}).get("data", self.summary.get("data_ranks"))
        return {**self.recipe.layout.model_dump(), "data": data}


def own_loss(evaluation: dict[str, Any]) -> float | None:
    """The loss of an evaluation at the run's own depth: auto where there is one, else the last listed."""
    losses = evaluation["loss"]
    return losses.get("auto", list(losses.values())[-1])


def read_run(path: Path, name: str) -> RunRecord:
    """Reads a run folder. Raises Refusal for a folder without a run, records that are missing or damaged, data that is not there."""
    recipe = Recipe.from_yaml(stored_recipe(path), str(path / CONFIG))
    records = read_records(path, name)
    return RunRecord(**vars(records), recipe=recipe, manifest=_manifest(path, recipe))


def make_folder(out: Path) -> None:
    """The folder of a report. Raises Refusal where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--out {out} cannot be made: {error.strerror}. Give another folder, or mend its permissions.") from error


def stored_recipe(path: Path) -> str:
    """The text of a run's config.yaml. Raises Refusal for a folder without a run."""
    config = path / CONFIG
    if not config.is_file():
        raise Refusal(
            f"There is no run in {path}: it has no {CONFIG}. Give the folder that `attractor train` wrote (run.dir).{_near(path)}"
        )
    return config.read_text(encoding="utf-8")


def read_records(path: Path, name: str) -> Records:
    """What a run of any regime recorded. Raises Refusal where that is no loss yet, or damaged."""
    metrics = read_lines(path / METRICS)
    if not any(_finite(record.get("loss")) for record in metrics):
        raise Refusal(
            f"The run {path} has no record of a loss yet ({METRICS} is missing, empty, or holds skipped steps only): there is nothing to "
            "compare. Wait until it has logged a step (train.log_every), or leave it out."
        )
    return Records(path, name, metrics, read_lines(path / EVALUATIONS), _json(path / STARTS).get("starts", []), _json(path / SUMMARY))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file. A last line without its end is left out: a kill, or a run that is
    writing it now, leaves one. Raises Refusal for any other line that is no object.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise Refusal(f"{path} has a line that is not JSON ({error}). Restore it from a copy, or leave this run out.") from error


def refuse_unlike(runs: Sequence[RunRecord]) -> None:
    """Raises Refusal unless all were validated on the same tokens: same tokenizer, windows, split (by hash, wherever it lies) and part of
    it.
    """
    first = runs[0]
    checks: tuple[tuple[str, Callable[[RunRecord], str], str], ...] = (
        ("tokenizers", lambda run: run.manifest.tokenizer_fingerprint[:12], "A loss a token of one is not a loss a token of the other."),
        ("sequence lengths", lambda run: str(run.sequence_length), "Windows of another length give tokens another context."),
        ("validation data", lambda run: run.validation_split.index_sha256[:12], "Their losses are of different text."),
    )
    for run in runs[1:]:
        for what, value, why in checks:
            if value(first) != value(run):
                raise Refusal(
                    f"{first.path} and {run.path} have different {what} ({value(first)} and {value(run)}): their losses cannot be "
                    f"compared. {why} Train both on data prepared alike, or compare bits per byte by `attractor evaluate`."
                )
    parts = {run.path: sorted({record["predicted_tokens"] for record in run.evaluations}) for run in runs if run.evaluations}
    if len({count for counts in parts.values() for count in counts}) > 1:
        told = "; ".join(f"{path}: {' and '.join(f'{count:,}' for count in counts)} tokens" for path, counts in parts.items())
        raise Refusal(
            f"These runs were validated on different parts of the validation split ({told}): their recorded losses cannot be compared. "
            "Train with one evaluation.tokens, or compare what `attractor evaluate` says of each: it takes the whole split."
        )


def _manifest(path: Path, recipe: Recipe) -> Manifest:
    """Of the set whose validation split the run uses: the first."""
    source = recipe.sources[0][0]
    try:
        manifest = open_manifest(source, recipe.data.cache)
        manifest.split(VALIDATION, source)
    except Refusal as error:
        raise Refusal(
            f"What the run {path} was validated on cannot be told. {error} A relative data.path counts from the folder this command is "
            "started in; with --no-evaluate the manifest.json alone is enough."
        ) from error
    return manifest


def _near(path: Path) -> str:
    """The run folder beside `path` whose name is nearest, as a question."""
    beside = [config.parent.name for config in path.parent.glob(f"*/{CONFIG}")]
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise Refusal(f"{path} is not JSON ({error}). Restore it from a copy, or leave this run out.") from error


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _along(known: NDArray, values: NDArray, at: NDArray) -> NDArray:
    """Values at `at`, linear between the origin and the known points, and beyond the last one at the rate of the last stretch."""
    x, y = np.concatenate([[0.0], known]), np.concatenate([[0.0], values])
    rate = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.interp(at, x, y) + np.maximum(0.0, at - x[-1]) * rate
