"""Plots from small records: a PNG comes out whatever the runs hold, and what is drawn is what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pretrain.plots import plot_training, read_records, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(run: Path, *, solver: bool, losses: list[float | None], evaluations: list[float]) -> Path:
    run.mkdir()
    extra: dict[str, Any] = {"solver_iterations": 3.5} if solver else {}
    metrics = [{"step": step, "tokens": step * 1000, "loss": loss, **extra} for step, loss in enumerate(losses, 1)]
    depths = ["0", "auto"] if solver else ["0"]
    validation = [{"step": 5 * n, "tokens": 5000 * n, "loss": dict.fromkeys(depths, loss)} for n, loss in enumerate(evaluations, 1)]
    for name, records in (("metrics.jsonl", metrics), ("evaluations.jsonl", validation)):
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_two_runs_make_one_picture(tmp_path: Path) -> None:
    runs = {
        "attractor": write_run(tmp_path / "a", solver=True, losses=[4.0, None, 3.0, 2.5], evaluations=[3.5, 2.75]),
        "transformer": write_run(tmp_path / "b", solver=False, losses=[4.0, 3.5], evaluations=[3.6]),
    }
    out = tmp_path / "new" / "loss.png"
    with patch("matplotlib.pyplot.close"):
        assert plot_training(runs, out) == out
        from matplotlib import pyplot

        losses, iterations = pyplot.gcf().axes
    assert out.read_bytes().startswith(PNG)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.get_lines()}
    assert drawn["attractor, training"][0] == pytest.approx([0.001, 0.003, 0.004]), "a skipped step has no loss to draw"
    assert drawn["attractor, validation"] == ([0.005, 0.01], [3.5, 2.75])
    assert drawn["transformer, validation"] == ([0.005], [3.6])
    assert [line.get_label() for line in iterations.get_lines()] == ["attractor"]
    assert "tokens" in losses.get_xlabel()
    assert "nats" in losses.get_ylabel()
    pyplot.close("all")


def test_a_run_that_just_began(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", solver=False, losses=[], evaluations=[])
    assert plot_training({"new": run}, tmp_path / "out.png").read_bytes().startswith(PNG)
    assert read_records(tmp_path / "missing.jsonl") == []


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([4.0, 0.0], keep=0.5) == pytest.approx([4.0, 4.0 / 3])
    assert smoothed([]) == []
