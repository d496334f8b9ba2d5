"""The pictures of a comparison: loss against tokens, FLOPs and time; loss by depth and proposal distance; solver iterations. PNG.

    loss.png          training losses smoothed over equal windows (lines), validation losses at each run's own depth (points)
    depth.png         validation loss at every recorded depth, a panel a run; then ||y* - y0|| / ||y0|| of all runs
    iterations.png    solver iterations (or loops) a sequence, as recorded

A run keeps its colour, dash and marker in all of them. The colours are those of Okabe and Ito, told apart by colour-blind readers
and in print by dash and marker too. A picture that has nothing to show is not drawn, and an older one of its name is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.compare_records import Curve, RunRecord

COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vPX*"
LOSS, DEPTH, ITERATIONS = "loss.png", "depth.png", "iterations.png"
_AXES = {"tokens": ("training tokens", "Loss against tokens"), "flops": ("training FLOPs (hardware)", "Loss against FLOPs")}
_AXES["seconds"] = ("seconds of training steps", "Loss against time")
_PANELS = 3  # in a row


def plot_comparison(runs: Sequence[RunRecord], smooth: Mapping[str, Curve], out: Path) -> list[str]:
    """Draws what there is to draw into the folder `out`; the names of the files. smooth: training curves by run name."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = {LOSS: _losses(runs, smooth), DEPTH: _depths(runs), ITERATIONS: _iterations(runs)}
    for name, figure in drawn.items():
        (out / name).unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(out / name, dpi=130)
            _pyplot().close(figure)
    return [name for name, figure in drawn.items() if figure is not None]


def style(number: int) -> dict[str, Any]:
    """Colour, dash and marker of the run of that number: 28 lines before two are alike."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)]}


def _losses(runs: Sequence[RunRecord], smooth: Mapping[str, Curve]) -> Any:
    figure, panels = _pyplot().subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    for axes, (axis, (label, title)) in zip(panels, _AXES.items(), strict=True):
        for number, run in enumerate(runs):
            look, curve, points = style(number), smooth[run.name], run.validation
            axes.plot(getattr(curve, axis), curve.loss, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
            axes.plot(getattr(points, axis), points.loss, color=look["color"], linestyle="none", marker=look["marker"], markersize=5.5)
        axes.set(xlabel=label, title=title)
        axes.xaxis.set_major_formatter(_thousands())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cross-entropy (nats a token)")
    _limit(panels[0], runs, smooth)
    handles = [_pyplot().Line2D([], [], **style(number), linewidth=1.4, label=run.name) for number, run in enumerate(runs)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(runs)),
        frameon=False,
        handlelength=4,
        title="line: training, smoothed over equal token windows; marker: validation, at the run's own depth",
    )
    return figure


def _limit(axes: Any, runs: Sequence[RunRecord], smooth: Mapping[str, Curve]) -> None:
    """Lets the first, steep steps leave the picture, so that the ends can be told apart: down from where each run was after a tenth."""
    shown = [loss for run in runs for loss in (*run.validation.loss, *smooth[run.name].loss[len(smooth[run.name].loss) // 10 :])]
    room = 0.05 * (max(shown) - min(shown)) or 0.05
    axes.set_ylim(min(shown) - room, max(shown) + room)


def _depths(runs: Sequence[RunRecord]) -> Any:
    deep = [(number, run) for number, run in enumerate(runs) if any(len(record["loss"]) > 1 for record in run.evaluations)]
    if not deep:
        return None
    told = [(number, run) for number, run in deep if any(_told(run, "proposal_distance"))]
    count = len(deep) + bool(told)
    columns = 2 if count == 4 else min(_PANELS, count)
    rows = -(-count // columns)
    figure, grid = _pyplot().subplots(rows, columns, figsize=(5 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axes in panels[1 : len(deep)]:  # before anything is drawn: limits are then of all
        axes.sharex(panels[0])
        axes.sharey(panels[0])
    for axes, (_, run) in zip(panels, deep, strict=False):
        _by_depth(axes, run)
    if told:
        _distances(panels[len(deep)], told)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(_thousands())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9, handlelength=4)
    return figure


def _by_depth(axes: Any, run: RunRecord) -> None:
    """Depths from light and dotted to dark and whole."""
    depths = list(dict.fromkeys(depth for record in run.evaluations for depth in record["loss"]))
    shades = _pyplot().get_cmap("viridis")
    for number, depth in enumerate(depths):
        told = [(record["tokens"], record["loss"][depth]) for record in run.evaluations if record["loss"].get(depth) is not None]
        look = {
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
            "color": shades(0.9 - 0.9 * number / len(depths)),
        }
        axes.plot(*zip(*told, strict=True), **look, markersize=4.5, linewidth=1.2, label=f"T = {depth}")
    axes.set(ylabel="validation loss (nats a token)", title=f"{run.name}: loss by depth T")


def _distances(axes: Any, told: Sequence[tuple[int, RunRecord]]) -> None:
    for number, run in told:
        axes.plot(*_told(run, "proposal_distance"), **style(number), markersize=4.5, linewidth=1.2, label=run.name)
    axes.set(ylabel="||y* - y0|| / ||y0||", title="Proposal distance, validation", ylim=(0, None))


def _told(run: RunRecord, key: str) -> tuple[list[float], list[float]]:
    """(tokens, value) of the evaluations that have the key."""
    told = [(record["tokens"], record[key]) for record in run.evaluations if record.get(key) is not None]
    return [at for at, _ in told], [value for _, value in told]


def _iterations(runs: Sequence[RunRecord]) -> Any:
    told = [(number, run, *run.series("solver_iterations")) for number, run in enumerate(runs)]
    told = [entry for entry in told if len(entry[2])]
    if not told:
        return None
    figure, axes = _pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    for number, run, tokens, iterations in told:
        axes.plot(tokens, iterations, **style(number), markersize=4, markevery=max(1, len(tokens) // 12), linewidth=1.2, label=run.name)
    axes.set(
        xlabel="training tokens", ylabel="iterations a sequence", title="Solver iterations (loops, where a model loops)", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, handlelength=4)
    return figure


def _thousands() -> Any:
    """Ticks as 500 k, 2 M, 90 T."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _pyplot() -> Any:
    from matplotlib import pyplot

    return pyplot
