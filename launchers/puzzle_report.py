"""Tables of `attractor evaluate` on puzzles: what each of its reports looks like on a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from launchers.output import console

_OF_BREADTH, _OF_DIFFICULTY = 6, 4
"""Numbers of supervision steps side by side at most: more do not fit a terminal of 80 columns."""


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _percent(share: float, error: float | None = None) -> str:
    return f"{100 * share:.2f}" if error is None else f"{100 * share:.2f} ± {100 * error:.2f}"


def _some(steps: list[str], most: int) -> list[str]:
    """At most so many steps, the first and the last among them."""
    count = min(most, len(steps))
    return [steps[place * (len(steps) - 1) // max(1, count - 1)] for place in range(count)]


def _head(result: dict[str, Any]) -> None:
    console().print(
        f"[bold]{escape(result['run'])}[/]: {result['kind']}, step {result['step']:,}; {result['puzzles']:,} puzzles, {result['game']}, of "
        f"{escape(result['data'])}",
        highlight=False,
        soft_wrap=True,
    )


def show_puzzles(result: dict[str, Any]) -> None:
    """By supervision steps, by difficulty, what halting does; by solver iterations and by breadth where they were asked for."""
    out = console()
    _head(result)
    _by_steps(result)
    _by_difficulty(result)
    if "iterations" in result:
        converged = f", {100 * result['converged']:.1f} % of solves within the tolerance" if "converged" in result else ""
        out.print(f"{result['iterations']:.2f} iterations a solve{converged}.", highlight=False)
    if "halting" in result:
        _halting(result["halting"])
    if "by_iterations" in result:
        _by_iterations(result)
    if "by_breadth" in result:
        _by_breadth(result)


def _by_steps(result: dict[str, Any]) -> None:
    out = console()
    mazes = "valid" in result
    table = _table("steps", "exact %", *(["shortest path %"] if mazes else []), "cells %", "loss")
    for step, share in result["exact"].items():
        figures = [_percent(share, result["exact_error"][step])]
        figures += [_percent(result["valid"][step], result["valid_error"][step])] if mazes else []
        table.add_row(step, *figures, _percent(result["cells"][step]), f"{result['loss'][step]:.4f}")
    out.print(table)
    if int(list(result["exact"])[-1]) > result["trained_steps"]:
        out.print(f"Trained on up to {result['trained_steps']} supervision steps.", highlight=False)


def _by_difficulty(result: dict[str, Any]) -> None:
    out = console()
    shown = _some(list(result["exact"]), _OF_DIFFICULTY)
    table = _table("rating", "puzzles", *(f"exact % at {step}" if len(shown) < 4 else f"% at {step}" for step in shown), "halts at")
    for part in result["by_difficulty"]:
        rating = f"{part['least']}" if part["least"] == part["largest"] else f"{part['least']}-{part['largest']}"
        last = shown[-1]
        shares = [_percent(part["exact"][step], part["exact_error"][step] if step == last else None) for step in shown]
        table.add_row(rating, f"{part['puzzles']:,}", *shares, f"{part['halting_steps']:.2f}")
    out.print(table)


def _halting(halting: dict[str, Any]) -> None:
    out = console()
    told = halting["stopped"]
    out.print(
        f"Halting: left when the head says stop, at step {halting['steps']:.2f} of {halting['bound']} on average "
        f"({100 * halting['saved']:.1f} % of the steps saved): {_percent(halting['exact'], halting['exact_error'])} % exact, against "
        f"{_percent(halting['exact_all_steps'])} % after all steps.",
        highlight=False,
    )
    table = _table("% of puzzles", "right", "wrong")
    table.add_row("the head says stop", _percent(told["right"]), _percent(told["wrong"]))
    table.add_row(f"not in {halting['bound']} steps", _percent(told["never_right"]), _percent(told["never_wrong"]))
    out.print(table)


def _by_iterations(result: dict[str, Any]) -> None:
    out = console()
    table = _table("T", "exact %", "difference", "cells %", "loss", "applications")
    for row in result["by_iterations"]:
        difference = "" if row["iterations"] == "auto" else f"{100 * row['difference']:+.2f} ± {100 * row['difference_error']:.2f}"
        figures = [_percent(row["exact"], row["exact_error"]), difference, _percent(row["cells"]), f"{row['loss']:.4f}"]
        table.add_row(row["iterations"], *figures, f"{row['evaluations']:.1f}")
    out.print(table)
    last = list(result["exact"])[-1]
    inner = "solve" if result["kind"] == "attractor" else "loop"
    out.print(
        f"After step {last}, every inner {inner} cut to T iterations; at 0 it is removed, and the network never sees the puzzle. "
        "difference: of exact % from auto, on the same puzzles. applications: of the network, a supervision step.",
        highlight=False,
    )


def _by_breadth(result: dict[str, Any]) -> None:
    out = console()
    steps = _some(list(result["exact"]), _OF_BREADTH)
    table = _table("starts", "exact %", *(f"{step} step{'s' if step != '1' else ''}" for step in steps))
    for row in result["by_breadth"]:
        if row is not result["by_breadth"][0]:
            table.add_section()
        for number, name in enumerate(("chosen", "mean", "any")):
            table.add_row(str(row["breadth"]) if number == 0 else "", name, *(_percent(row[name][step]) for step in steps))
    out.print(table)
    worst = max(error for row in result["by_breadth"] for error in row["chosen_error"].values())
    out.print(
        "chosen: the answer of the start whose latents moved least in the last step taken; mean: over the starts; any: puzzles that some "
        f"start has right. Standard errors up to {100 * worst:.2f}.",
        highlight=False,
    )


def show_puzzle_internalization(result: dict[str, Any]) -> None:
    """By depth after the last supervision step; then by supervision step."""
    out = console()
    _head(result)
    last, solves = result["steps"], "iterations" in result
    table = _table("T", *("exact %", "cells %", "agreement %") * 2)
    inner = "solve" if solves else "loop"
    out.print(f"After supervision step {last}, every {inner} of this step cut to T (left), of every step (right).", highlight=False)
    for depth in result["this_step"]["exact"]:
        ways = [result[way][figure][depth][-1] for way in ("this_step", "all_steps") for figure in ("exact", "cells", "agreement")]
        table.add_row(depth, *map(_percent, ways))
    out.print(table)
    solver = ["iterations", "converged %"] if solves else []
    table = _table("step", "distance", *solver, "exact %", "at 0", "agrees %")
    for step in sorted({*(1 << power for power in range(last.bit_length())), last}):
        figures = [f"{result['distance'][step - 1]:.3g}"]
        if solves:
            figures += [f"{result['iterations'][step - 1]:.2f}", _percent(result["converged"][step - 1])]
        here = result["this_step"]
        shares = [here["exact"]["auto"], here["exact"]["0"], here["agreement"]["0"]]
        table.add_row(str(step), *figures, *(_percent(share[step - 1]) for share in shares))
    out.print(table)
    out.print(
        "distance: |z* - z0| / |z0| over the step. at 0, agrees: this step's answer at T = 0, and its cells as at auto.", highlight=False
    )
    for file in result["files"]:
        out.print(file, highlight=False, markup=False, soft_wrap=True)


def show_pictures(result: dict[str, Any]) -> None:
    out = console()
    for file, found in zip(result["files"], result["puzzles"], strict=True):
        outcome = "exact" if found["exact"] else "not exact"
        out.print(f"{file}  rating {found['rating']}, {outcome}", highlight=False, markup=False, soft_wrap=True)
