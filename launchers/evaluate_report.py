"""Tables of `attractor evaluate`: what each of its reports looks like on a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from launchers.output import console


def show_core(result: dict[str, Any]) -> None:
    out = console()
    bound = "" if result["max_per_task"] is None else f", at most {result['max_per_task']} examples a task"
    out.print(f"[bold]{result['run']}[/]: step {result['step']}, depth {result['depth']}{bound}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    for column in ("shots", "examples", "accuracy", "baseline", "centred"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in result["tasks"]:
        figures = (f"{task[name]:.4f}" for name in ("accuracy", "baseline", "centred"))
        table.add_row(task["label"], str(task["fewshot"]), f"{task['examples']:,}", *figures)
    table.add_section()
    table.add_row("CORE", "", "", "", "", f"[bold]{result['core']:.4f}[/]")
    out.print(table)
    if cut := [task["label"] for task in result["tasks"] if task["cut"]]:
        most = max(task["cut"] for task in result["tasks"])
        out.print(
            f"Cut on the left to fit the sequence length: up to {100 * most:.0f} % of the prompts in {len(cut)} task(s).", highlight=False
        )


def show_solvers(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver")
    for column in ("evaluations", "seconds", "loss", "leak"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["solver"], f"{row['evaluations']:.2f}", f"{row['solve_seconds']:.3f}", f"{row['loss']:.4f}", f"{row['leak']:.1e}")
    out = console()
    out.print(table)
    out.print("seconds: of the solve of one batch.")
    out.print("leak: relative change of the first three quarters of the states when the last quarter of the tokens is replaced.")


def show_losses(result: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{result['run']}[/]: step {result['step']}, {result['tokens']:,} predicted tokens", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("solver iterations", "loss", "perplexity", "bits per byte", "mean iterations used"):
        table.add_column(column, justify="right")
    used, bits = result.get("iterations", {}), result.get("bits_per_byte", {})
    for depth, loss in result["loss"].items():
        of_bytes = f"{bits[depth]:.4f}" if depth in bits else ""
        table.add_row(depth, f"{loss:.4f}", f"{result['perplexity'][depth]:.2f}", of_bytes, f"{used[depth]:.2f}" if depth in used else "")
    out.print(table)
    if "proposal_distance" in result:
        distance, converged = result["proposal_distance"], 100 * result["converged"]
        out.print(f"||y* - y0|| / ||y0|| = {distance:.3g}; {converged:.1f} % of sequences within the tolerance.", highlight=False)


def show_tasks(result: dict[str, Any]) -> None:
    """lm-eval's results: a row a task and metric; the tasks of a group under it."""
    out = console()
    bound = "" if result["limit"] is None else f", at most {result['limit']} documents a task"
    out.print(f"[bold]{result['path']}[/]: through {result['through']}{bound}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("value", "stderr", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        error = "" if row["stderr"] is None else _figure(row["stderr"], 2)
        table.add_row("  " * row["depth"] + row["alias"], row["metric"], _figure(row["value"]), error, f"{row['n']:,}")
    out.print(table)
    if result["cut"]:
        out.print(f"{result['cut']} requests were longer than the model's window and lost their left end.", highlight=False)
    if result["file"] is not None:
        out.print(f"lm-eval's results: {result['file']}", highlight=False, soft_wrap=True)


def _figure(value: float, digits: int = 4) -> str:
    """Four decimals of what is near 1, so many digits of what is large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.{digits}g}"


def show_internalization(result: dict[str, Any]) -> None:
    """By depth; then, where tokens have iterations of their own, by position and by frequency."""
    out = console()
    out.print(f"[bold]{result['run']}[/]: {result['kind']}, step {result['step']}, {result['tokens']:,} predicted tokens", highlight=False)
    table = _numbers("solver iterations" if "iterations" in result else "loops", "loss", "perplexity", "accuracy", "agreement", "KL (nats)")
    for depth, loss in result["loss"].items():
        shares = (f"{100 * result[name][depth]:.2f} %" for name in ("accuracy", "agreement"))
        table.add_row(depth, f"{loss:.4f}", f"{result['perplexity'][depth]:.2f}", *shares, f"{result['divergence'][depth]:.2g}")
    out.print(table)
    if "proposal_distance" in result:
        out.print(f"||y* - y0|| / ||y0|| = {result['proposal_distance']:.3g}, mean over sequences.", highlight=False)
    if "by_position" in result:
        out.print(
            f"{result['iterations']:.2f} iterations a token; {100 * result['converged']:.1f} % within the tolerance.", highlight=False
        )
        table = _numbers("position", "tokens", "iterations", "agrees at 0", "loss at 0", "at auto")
        for group in result["by_position"]:
            place = f"{group['first']}" if group["first"] == group["last"] else f"{group['first']}-{group['last']}"
            table.add_row(place, *_group(group))
        out.print(table)
        table = _numbers("decile", "entries", "tokens", "iterations", "agrees at 0", "loss at 0", "at auto")
        for group in result["by_frequency"]:
            table.add_row(str(group["part"]), f"{group['entries']:,}", *_group(group))
        out.print(table)
        out.print("Deciles of the text by frequency of the token at the position: 1 the most frequent.")
    for file in result["files"]:
        out.print(file, highlight=False, soft_wrap=True)


def _numbers(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _group(group: dict[str, Any]) -> list[str]:
    losses = [f"{group[name]:.4f}" for name in ("loss_0", "loss_auto")]
    return [f"{group['tokens']:,}", f"{group['iterations']:.2f}", f"{100 * group['agreement']:.2f} %", *losses]
