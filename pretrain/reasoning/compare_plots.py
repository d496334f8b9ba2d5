"""The pictures of a comparison of puzzle runs. PNG.

    accuracy.png    share of puzzles solved against steps, training FLOPs and seconds
    sizes.png       share of puzzles solved at the end against parameters in matrix products, where arms are of several sizes

An arm has one colour, dash and marker. A line is the mean over its seeds at the evaluations that all of them have, the band reaches from
the least to the most accurate seed. FLOPs and seconds are means over seeds too. A picture that has nothing to show is not drawn, and an
older one of its name is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.compare_plots import style
from pretrain.reasoning.compare_arms import Arm

ACCURACY, SIZES = "accuracy.png", "sizes.png"
_AXES = {
    "steps": ("optimizer steps", "Accuracy against steps"),
    "flops": ("training FLOPs (hardware)", "Accuracy against FLOPs"),
    "seconds": ("seconds of training steps", "Accuracy against time"),
}


def plot_puzzles(arms: Sequence[Arm], out: Path, measured_on: str) -> list[str]:
    """Draws what there is to draw into the folder `out`; the names of the files. measured_on: what the accuracies are of."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = {ACCURACY: _accuracy(arms, measured_on), SIZES: _sizes(arms, measured_on)}
    for name, figure in drawn.items():
        (out / name).unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(out / name, dpi=130)
            _pyplot().close(figure)
    return [name for name, figure in drawn.items() if figure is not None]


def over_seeds(arm: Arm) -> dict[str, NDArray]:
    """steps, flops, seconds (means) and exact of every seed [seeds, n], at the evaluations that all seeds have."""
    curves = [run.accuracy for run in arm.runs]
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    rows = [np.searchsorted(curve.steps, steps) for curve in curves]
    means = {
        axis: np.mean([getattr(curve, axis)[row] for curve, row in zip(curves, rows, strict=True)], axis=0) for axis in ("flops", "seconds")
    }
    return {"steps": steps, **means, "exact": np.stack([curve.exact[row] for curve, row in zip(curves, rows, strict=True)])}


def _accuracy(arms: Sequence[Arm], measured_on: str) -> Any:
    figure, panels = _pyplot().subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    curves = [over_seeds(arm) for arm in arms]
    for axes, (axis, (name, title)) in zip(panels, _AXES.items(), strict=True):
        for number, found in enumerate(curves):
            look, exact = style(number), 100 * found["exact"]
            axes.plot(found[axis], exact.mean(axis=0), **look, markersize=4.5, linewidth=1.4)
            axes.fill_between(found[axis], exact.min(axis=0), exact.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=name, title=title, xlim=(0, None))
        axes.xaxis.set_major_formatter(_thousands())
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation puzzles solved (%)", ylim=_range([100 * found["exact"].max() for found in curves]))
    _legend(figure, [(style(number), arm) for number, arm in enumerate(arms)], f"{measured_on}; line: mean over seeds, band: least to most")
    return figure


def _sizes(arms: Sequence[Arm], measured_on: str) -> Any:
    """A line a family: arms that differ in size alone."""
    families: dict[str, list[int]] = {}
    for number, arm in enumerate(arms):
        families.setdefault(arm.family, []).append(number)
    if len({arm.runs[0].parameters()["matmul"] for arm in arms}) < 2:
        return None
    figure, axes = _pyplot().subplots(figsize=(7, 5), layout="constrained")
    for members in families.values():
        sized = sorted(members, key=lambda number: arms[number].runs[0].parameters()["matmul"])
        sizes = [arms[number].runs[0].parameters()["matmul"] for number in sized]
        exact = [100 * np.array([run.accuracy.exact[-1] for run in arms[number].runs]) for number in sized]
        axes.plot(sizes, [shares.mean() for shares in exact], color="0.6", linewidth=1, zorder=1)
        for number, size, shares in zip(sized, sizes, exact, strict=True):
            look, mean = style(number), shares.mean()
            spread = [[mean - shares.min()], [shares.max() - mean]]
            axes.errorbar(
                [size], [mean], yerr=spread, color=look["color"], marker=look["marker"], capsize=3, linestyle="none", markersize=7
            )
    axes.set(
        xlabel="parameters in matrix products",
        ylabel="validation puzzles solved at the end (%)",
        title="Accuracy against size",
        xscale="log",
        ylim=_range([100 * run.accuracy.exact[-1] for arm in arms for run in arm.runs]),
    )
    _ticks_at(axes, sorted({arm.runs[0].parameters()["matmul"] for arm in arms}))
    axes.grid(alpha=0.3)
    looks = [({**style(number), "linestyle": "none"}, arm) for number, arm in enumerate(arms)]
    _legend(figure, looks, f"{measured_on}\npoint: mean over seeds, bar: least to most; grey: alike but for size")
    return figure


def _range(percents: Sequence[float]) -> tuple[float, float]:
    """Of the axis: room above the highest, and at 0 and 100 % for a marker's half."""
    top = min(102.0, max(1.0, 1.1 * max(percents)))
    return -0.02 * top, top


def _ticks_at(axes: Any, sizes: Sequence[int]) -> None:
    """Ticks at the sizes there are, those too near to the one before left out: decades alone would leave such an axis unread."""
    from matplotlib.ticker import EngFormatter

    apart: list[int] = []
    for size in sizes:
        if not apart or size > 1.2 * apart[-1]:
            apart.append(size)
    axes.set_xticks(apart)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(EngFormatter(places=1))


def _legend(figure: Any, looks: Sequence[tuple[dict[str, Any], Arm]], title: str) -> None:
    handles = [
        _pyplot().Line2D([], [], **look, linewidth=1.4, label=f"{arm.name} ({len(arm.runs)} seed{'s' * (len(arm.runs) > 1)})")
        for look, arm in looks
    ]
    columns = 4 if figure.get_figwidth() > 10 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, handlelength=4, title=title)


def _thousands() -> Any:
    """Ticks as 500 k, 2 M, 90 T."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _pyplot() -> Any:
    from matplotlib import pyplot

    return pyplot
