"""The demo: Python's own documentation to shards, an Attractor and a Transformer of its width on the same tokens, one table, one picture.

Everything stays in one folder (data, two runs, loss.png). What is finished there is used again; what was interrupted goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from launchers.commands.data import preparing
from launchers.local import launch
from launchers.output import console, fraction_bar, si
from pretrain.config import load_recipe
from pretrain.errors import RunStopped

FOLDER = Path("demo")
RUNS = {"Attractor": "demo", "Transformer": "demo-transformer"}
ENTRY = Path(__file__).resolve().parent.parent / "pretrain" / "train.py"


def demo(folder: Path = FOLDER) -> None:
    """Prepares, trains, evaluates, prints. Raises RunStopped with a run's own code when one stops."""
    out = console()
    data = folder / "data"
    _prepare(data)
    runs = {label: folder / recipe for label, recipe in RUNS.items()}
    for label, recipe in RUNS.items():
        train_one(label, recipe, [f"data.path={data}"], runs[label])
    reports = {label: _evaluate(label, run) for label, run in runs.items()}
    out.print(_table(reports, {label: run_summary(run) for label, run in runs.items()}))
    from pretrain.plots import plot_training

    picture = plot_training(runs, folder / "loss.png")
    out.print(f"Loss against tokens: {picture}    Records: {', '.join(f'{run}/metrics.jsonl' for run in runs.values())}", highlight=False)
    out.print(f"Next: attractor evaluate {runs['Attractor']} --solver-iterations 0,1,2,4,8,auto", highlight=False)


def _prepare(data: Path) -> None:
    from data_pipeline import open_manifest, prepare
    from data_pipeline.manifest import MANIFEST

    recipe = load_recipe("demo")
    if not (data / MANIFEST).exists():
        with preparing() as report:
            prepare(
                ["python-docs"],
                data,
                vocabulary_size=recipe.model.vocabulary_size,
                sequence_length=recipe.data.sequence_length or 256,
                validation=0.02,
                workers=2,
                progress=report,
            )
    split = open_manifest(data).splits["train"]
    console().print(f"Data: {split.bytes / 1e6:.1f} MB of English text, {si(split.tokens, 'tokens')}, in {data}", highlight=False)


def train_one(label: str, recipe: str, overrides: list[str], run: Path) -> None:
    """Trains to the end of the budget, from where an earlier demo left off."""
    found = run_summary(run)
    if found and found["step"] == found["total_steps"]:
        console().print(f"{label}: already trained in {run}", highlight=False)
        return
    console().print(f"{label}: training in {run}", highlight=False)
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    code = launch([str(ENTRY), recipe, *overrides, f"run.dir={run}", *resume], 1)
    if code:
        sys.stdout.flush()
        raise RunStopped(f"The {label} run stopped with exit code {code}; `attractor demo` goes on from its last checkpoint.", code)


def run_summary(run: Path) -> dict[str, Any]:
    """summary.json of a run; empty where there is none."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _evaluate(label: str, run: Path) -> dict[str, Any]:
    from pretrain.evaluate import evaluate_run

    with fraction_bar(f"{label}: validation") as report:
        return evaluate_run(run, [0, 1, 2, 4, "auto"], progress=report)


def _table(reports: dict[str, dict[str, Any]], summaries: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Validation loss, nats a token", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for label in reports:
        table.add_column(label, justify="right")

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(reports[label], summaries[label]) for label in reports))

    for depth in ("0", "1", "2", "4", "auto"):
        name = {"0": "0 iterations (proposal)", "1": "1 iteration", "auto": "converged"}.get(depth, f"{depth} iterations")
        row(name, lambda report, _, depth=depth: f"{report['loss'][depth]:.4f}" if depth in report["loss"] else "")
    row("perplexity, converged", lambda report, _: f"{list(report['perplexity'].values())[-1]:.2f}")
    row("iterations to converge", lambda report, _: f"{report['iterations']['auto']:.2f}" if "iterations" in report else "")
    row("||y* - y0|| / ||y0||", lambda report, _: f"{report['proposal_distance']:.3f}" if "iterations" in report else "")
    table.add_section()
    row("parameters", lambda _, summary: si(summary["parameters"]["total"]))
    row("  in matrix products", lambda _, summary: si(summary["parameters"]["matmul"]))
    row("tokens", lambda _, summary: si(summary["tokens"]))
    row("training FLOPs", lambda _, summary: si(summary["flops"]["total"]))
    row("seconds", lambda _, summary: f"{summary['seconds']:.0f}")
    return table
