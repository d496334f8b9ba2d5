"""The demo on puzzles: a generated set, an Attractor reasoner and a TRM of its size on it, one table, pictures of what they answer.

Everything stays in one folder (data, two runs, pictures). What is finished there is used again; what was interrupted goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from launchers.demo import run_summary, train_one
from launchers.output import console, fraction_bar, si

RUNS = {"Attractor": ("attractor", []), "TRM": ("trm", ["model.kind=trm"])}
"""Label -> folder and overrides; all else of the recipe is the same."""
SETS: dict[str, dict[str, int]] = {"sudoku": {"size": 4, "puzzles": 1000}, "maze": {"size": 6, "puzzles": 12_000, "least": 5}}
HELD_OUT = 500
DRAWN = 3


def puzzle_demo(game: str, folder: Path) -> None:
    """Prepares, trains, evaluates, draws, prints. Raises RunStopped with a run's own code when one stops."""
    out, data, recipe = console(), folder / "data", f"{game}-demo"
    _prepare(game, data)
    runs = {label: folder / name for label, (name, _) in RUNS.items()}
    for label, (_, overrides) in RUNS.items():
        train_one(label, recipe, [*overrides, f"data.path={data}"], runs[label])
    reports = {label: _evaluate(label, run) for label, run in runs.items()}
    out.print(_table(reports, {label: run_summary(run) for label, run in runs.items()}))
    from pretrain.reasoning.draw import PICTURES, draw_puzzles

    drawn = draw_puzzles(runs["Attractor"], runs["Attractor"] / PICTURES, DRAWN)
    out.print(f"Pictures, step by step: {drawn['files'][0]} and {len(drawn['files']) - 1} more", highlight=False, soft_wrap=True)
    out.print(f"Next: attractor evaluate {runs['Attractor']} --solver-iterations 0,1,2,auto --steps 1,4,16,64", highlight=False)


def _prepare(game: str, data: Path) -> None:
    from data_pipeline.manifest import MANIFEST
    from data_pipeline.puzzles import open_puzzles
    from data_pipeline.puzzles.prepare import prepare_puzzles

    if not (data / MANIFEST).exists():
        with fraction_bar("generating") as report:
            prepare_puzzles(game, data, **SETS[game], validation=str(HELD_OUT), progress=report)
    manifest = open_puzzles(data)
    counts = ", ".join(f"{split.puzzles:,} {name}" for name, split in manifest.splits.items())
    console().print(f"Data: {manifest.game} {manifest.height}x{manifest.width}, generated: {counts}, in {data}", highlight=False)


def _evaluate(label: str, run: Path) -> dict[str, Any]:
    from pretrain.reasoning.report import evaluate_puzzle_run

    with fraction_bar(f"{label}: validation") as report:
        return evaluate_puzzle_run(run, iterations=[0, 1, "auto"], progress=report)


def _table(reports: dict[str, dict[str, Any]], summaries: dict[str, dict[str, Any]]) -> Table:
    some = next(iter(reports.values()))
    table = Table(
        title=f"Whole grids right, of {some['puzzles']} not trained on", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    table.add_column("")
    for label in reports:
        table.add_column(label, justify="right")

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(reports[label], summaries[label]) for label in reports))

    for step in some["exact"]:
        row(f"after {step} step{'s' if step != '1' else ''}", lambda report, _, step=step: f"{100 * report['exact'][step]:.1f} %")
    for depth, name in (("0", "inner loop removed"), ("1", "cut to 1 application")):
        row(name, lambda report, _, depth=depth: f"{100 * _at(report, depth)['exact']:.1f} %")
    row("cells right", lambda report, _: f"{100 * list(report['cells'].values())[-1]:.1f} %")
    row("solver iterations a solve", lambda report, _: f"{report['iterations']:.2f}" if "iterations" in report else "")
    table.add_section()
    row("parameters", lambda _, summary: si(summary["parameters"]["total"]))
    row("  in matrix products", lambda _, summary: si(summary["parameters"]["matmul"]))
    row("cells trained on", lambda _, summary: si(summary["tokens"]))
    row("training FLOPs", lambda _, summary: si(summary["flops"]["total"]))
    row("seconds", lambda _, summary: f"{summary['seconds']:.0f}")
    return table


def _at(report: dict[str, Any], depth: str) -> dict[str, Any]:
    return next(row for row in report["by_iterations"] if row["iterations"] == depth)
