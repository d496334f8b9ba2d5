"""Pictures of runs, from their records alone: loss against tokens, iterations against tokens. PNG, units on the axes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.run_folder import EVALUATIONS, METRICS

_SMOOTH = 0.9


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def smoothed(values: Sequence[float], keep: float = _SMOOTH) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def plot_training(runs: Mapping[str, Path], out: Path) -> Path:
    """Loss (training smoothed, validation as points) and solver iterations against tokens; `runs` is folder by label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    solving = [label for label, run in runs.items() if any("solver_iterations" in r for r in read_records(run / METRICS))]
    figure, axes = pyplot.subplots(1, 2 if solving else 1, figsize=(11 if solving else 6.5, 4.2), squeeze=False, layout="constrained")
    losses = axes[0][0]
    for label, run in runs.items():
        metrics = [record for record in read_records(run / METRICS) if record["loss"] is not None]
        tokens = [record["tokens"] / 1e6 for record in metrics]
        (line,) = losses.plot(tokens, smoothed([record["loss"] for record in metrics]), label=f"{label}, training", linewidth=1.2)
        evaluations = read_records(run / EVALUATIONS)
        last = [list(record["loss"].values())[-1] for record in evaluations]
        points = [record["tokens"] / 1e6 for record in evaluations]
        losses.plot(points, last, "o--", color=line.get_color(), markersize=4, linewidth=0.8, label=f"{label}, validation")
        if label in solving:
            axes[0][1].plot(tokens, [record["solver_iterations"] for record in metrics], color=line.get_color(), label=label, linewidth=1)
    losses.set(xlabel="tokens (millions)", ylabel="cross-entropy (nats a token)", title="Loss against tokens")
    _limit(losses)
    losses.grid(alpha=0.3)
    losses.legend(frameon=False)
    if solving:
        axes[0][1].set(xlabel="tokens (millions)", ylabel="evaluations of f a sequence", title="Solver iterations", ylim=(0, None))
        axes[0][1].grid(alpha=0.3)
        axes[0][1].legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
    return out


def _limit(axis: Any) -> None:
    """Lets the first, steep steps leave the picture, so that the end can be told apart."""
    values = sorted(value for line in axis.get_lines() for value in line.get_ydata())
    if values:
        low, high = values[0], values[int(0.95 * (len(values) - 1))]
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
