"""The picture of an internalization report: what depth buys, and where in the text the solve works. PNG, units on the axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_internalization(report: dict[str, Any], out: Path) -> Path:
    """Two panels by depth; where tokens have iterations of their own, two more: by position and by frequency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    solved = "by_position" in report
    figure, grid = pyplot.subplots(2 if solved else 1, 2, figsize=(10.5, 7.6 if solved else 4), squeeze=False, layout="constrained")
    figure.suptitle(
        f"{report['kind']}, step {report['step']:,}: {report['tokens']:,} predicted tokens of the validation split", fontsize=11
    )
    _losses(grid[0][0], report)
    _shares(grid[0][1], report)
    if solved:
        _positions(grid[1][0], report["by_position"])
        _frequencies(grid[1][1], report["by_frequency"])
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
    return out


def _depths(axis: Any, report: dict[str, Any]) -> list[int]:
    labels = list(report["loss"])
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("solver iterations T" if "iterations" in report else "loops T")
    axis.grid(alpha=0.3)
    return list(range(len(labels)))


def _losses(axis: Any, report: dict[str, Any]) -> None:
    axis.plot(_depths(axis, report), list(report["loss"].values()), "o-", color="C0")
    axis.set(ylabel="cross-entropy (nats a token)", title="Loss by depth")


def _shares(axis: Any, report: dict[str, Any]) -> None:
    places = _depths(axis, report)
    axis.plot(places, [100 * value for value in report["agreement"].values()], "o-", color="C1", label="same most likely token as at auto")
    axis.plot(places, [100 * value for value in report["accuracy"].values()], "s--", color="C2", label="next token right")
    axis.set(ylabel="predicted tokens (%)", title="Agreement with auto, and accuracy", ylim=(0, 104))
    axis.legend(frameon=False, loc="center right")


def _both(axis: Any, places: list[float], groups: list[dict[str, Any]], title: str, xlabel: str) -> None:
    """Iterations on the left axis, disagreement at T = 0 on the right."""
    counts, misses = [group["iterations"] for group in groups], [100 * (1 - group["agreement"]) for group in groups]
    (line,) = axis.plot(places, counts, "o-", color="C0", label="iterations")
    axis.set(ylabel="evaluations of f a token", title=title, xlabel=xlabel, ylim=(0, 1.15 * max(counts)))
    axis.grid(alpha=0.3)
    other = axis.twinx()
    (shares,) = other.plot(places, misses, "s--", color="C3", label="T = 0 disagrees with auto")
    other.set(ylabel="predicted tokens (%)", ylim=(0, 1.15 * max(*misses, 1.0)))
    axis.legend(handles=[line, shares], frameon=False, loc="lower right")


def _positions(axis: Any, groups: list[dict[str, Any]]) -> None:
    places = [(group["first"] + group["last"]) / 2 + 1 for group in groups]
    _both(axis, places, groups, "By position in the window", "position, from 1 (middle of its range)")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")


def _frequencies(axis: Any, groups: list[dict[str, Any]]) -> None:
    places = [group["part"] for group in groups]
    _both(axis, places, groups, "By frequency of the token at the position", "decile of the text: 1 most frequent tokens, 10 rarest")
    axis.set_xticks(range(1, 11))
