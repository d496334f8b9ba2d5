"""The picture of a reasoner's internalization: accuracy and agreement by inner iterations, solve and distance by supervision step. PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_STYLES = (("this_step", "o-", "this step cut"), ("all_steps", "s--", "all steps cut"))


def plot_puzzle_internalization(report: dict[str, Any], out: Path) -> Path:
    """Four panels: two by depth T after the last step, two by supervision step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10.5, 7.6), layout="constrained")
    about = f"{report['kind']}, step {report['step']:,}: {report['puzzles']:,} validation puzzles, {report['game']}"
    figure.suptitle(about, fontsize=11)
    _accuracies(grid[0][0], report)
    _agreements(grid[0][1], report)
    _solve(grid[1][0], report)
    _proposals(grid[1][1], report)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
    return out


def _depths(axis: Any, report: dict[str, Any]) -> list[int]:
    names = list(report["this_step"]["exact"])
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("solver iterations T" if "iterations" in report else "inner loops T")
    axis.grid(alpha=0.3)
    return list(range(len(names)))


def _last(figures: dict[str, list[float]]) -> list[float]:
    return [100 * by_step[-1] for by_step in figures.values()]


def _accuracies(axis: Any, report: dict[str, Any]) -> None:
    places = _depths(axis, report)
    for way, style, label in _STYLES:
        axis.plot(places, _last(report[way]["exact"]), style, color="C0", label=f"whole grids, {label}")
        axis.plot(places, _last(report[way]["cells"]), style, color="C2", label=f"cells, {label}")
    axis.set(ylabel="right (%)", title=f"Accuracy after supervision step {report['steps']}", ylim=(-3, 104))
    axis.legend(frameon=False, fontsize=8)


def _agreements(axis: Any, report: dict[str, Any]) -> None:
    places = _depths(axis, report)
    for way, style, label in _STYLES:
        axis.plot(places, _last(report[way]["agreement"]), style, color="C1", label=label)
    axis.set(ylabel="cells answered as at auto (%)", title=f"Agreement with auto after step {report['steps']}")
    axis.legend(frameon=False, fontsize=8)


def _steps(axis: Any, report: dict[str, Any]) -> list[int]:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("supervision step")
    axis.grid(alpha=0.3)
    return list(range(1, report["steps"] + 1))


def _solve(axis: Any, report: dict[str, Any]) -> None:
    """The distance on the left axis; of a solver, its iterations on the right."""
    places = _steps(axis, report)
    (line,) = axis.plot(places, report["distance"], "o-", color="C3", markersize=3, label="‖z* - z0‖ / ‖z0‖")
    axis.set(ylabel="‖z* - z0‖ / ‖z0‖", title="What a step does to z")
    if max(report["distance"]) > 10 * min(report["distance"]) > 0:
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.4 * max(report["distance"]))  # the legend is above
    handles = [line]
    if "iterations" in report:
        other = axis.twinx()
        (count,) = other.plot(places, report["iterations"], "s--", color="C0", markersize=3, label="iterations a solve")
        other.set(ylabel="solver iterations", ylim=(0, 1.4 * max(report["iterations"])))
        handles.append(count)
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="upper right")


def _proposals(axis: Any, report: dict[str, Any]) -> None:
    places, figures = _steps(axis, report), report["this_step"]
    for name, style in (("auto", "C0o-"), ("1", "C2^:"), ("0", "C3s--")):
        if name in figures["exact"]:
            axis.plot(places, [100 * share for share in figures["exact"][name]], style, markersize=3, label=f"whole grids at {name}")
    axis.plot(places, [100 * share for share in figures["agreement"]["0"]], "d-.", color="C1", markersize=3, label="cells at 0 as at auto")
    axis.set(ylabel="puzzles, cells (%)", title="This step cut to T", ylim=(-3, 104))
    axis.legend(frameon=False, fontsize=8)
