"""A comparison of puzzle runs in words and rows: what the terminal's tables and compare.md have in common. From the document alone.

`accuracy_rows` and `cost_rows` are cells of text, a row an arm; `findings` are sentences, each true of the document it is made from;
`markdown` is the whole report. Shares are shown in percent, as mean ± sample standard deviation over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pretrain.compare_report import MATCHED

ACCURACY_COLUMNS = ("arm", "seeds", "exact", "cells", "best", "reached", "iters")
COST_COLUMNS = ("arm", "kind", "params", "matmul", "steps", "puzzle steps", "tokens", "FLOPs", "seconds")
NOTE = (
    "Mean ± standard deviation over seeds, at the last evaluation and its last supervision step. exact: puzzles with every cell right; "
    "cells: cells right, given ones too; valid: mazes with any shortest path marked; best: the highest of all evaluations, which picks by "
    "the same puzzles; reached: steps to the first evaluation with {accuracy:g} % exact; iters: iterations of a solve, in evaluation."
)
COST_NOTE = (
    "Means over seeds. params: all; matmul: in matrix products of blocks; puzzle steps: one supervision step of one puzzle; tokens: their "
    "cells; FLOPs: the model's; seconds: of training steps."
)


def accuracy_rows(document: dict[str, Any]) -> list[list[str]]:
    """Under ACCURACY_COLUMNS; mazes have a further one, `valid`, where `has_valid`."""
    return [
        [
            label(arm),
            str(len(arm["seeds"])),
            percent(arm["exact"]),
            percent(arm["cells"]),
            *([percent(arm["valid"])] if has_valid(document) else []),
            percent(arm["best"]),
            _reached(arm),
            number(arm["iterations"]["evaluation"], ".2f"),
        ]
        for arm in document["arms"]
    ]


def has_valid(document: dict[str, Any]) -> bool:
    """Whether grids were judged by whether they are valid, too: mazes may have several shortest paths."""
    return any(arm["valid"] is not None for arm in document["arms"])


def cost_rows(document: dict[str, Any]) -> list[list[str]]:
    """Under COST_COLUMNS: means over seeds."""
    return [
        [
            label(arm),
            arm["kind"],
            *(_short(arm["parameters"][kind]) for kind in ("total", "matmul")),
            f"{arm['step']['mean']:,.0f}",
            *(_short(arm[key]["mean"]) for key in ("puzzle_steps", "tokens")),
            _short(arm["flops"]["model"]["mean"]),
            number(arm["seconds"], ",.0f"),
        ]
        for arm in document["arms"]
    ]


def label(arm: dict[str, Any]) -> str:
    return f"{arm['name']} ({arm['unfinished']} unfinished)" if arm["unfinished"] else arm["name"]


def percent(found: dict[str, Any] | None) -> str:
    """A share as mean ± sd, in percent; the mean alone of one seed."""
    if found is None:
        return ""
    return f"{100 * found['mean']:.1f}" if found["sd"] is None else f"{100 * found['mean']:.1f} ± {100 * found['sd']:.1f}"


def number(found: dict[str, Any] | None, form: str) -> str:
    return "" if found is None else format(found["mean"], form)


def _short(value: float) -> str:
    """In four digits: 27.28e6 is shown as 27.28 M."""
    for factor, sign in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {sign}"
    return f"{value:.4g}"


def _reached(arm: dict[str, Any]) -> str:
    """Steps of the seeds that got there, from least to most, and how many did where not all."""
    told, seeds = arm["reached"], len(arm["seeds"])
    if not told["runs"]:
        return "never"
    low, high = f"{told['step']['low']:,}", f"{told['step']['high']:,}"
    steps = low if low == high else f"{low} to {high}"
    return steps if told["runs"] == seeds else f"{steps} ({told['runs']} of {seeds})"


def findings(document: dict[str, Any]) -> list[str]:
    """What can be said, a sentence each."""
    data, arms = document["data"], {arm["name"]: arm for arm in document["arms"]}
    said = [_difference(pair, arms) for pair in document["matched"]]
    said += [_agreement(pair) for pair in document["matched"]]
    alone = [name for name, arm in arms.items() if len(arm["seeds"]) == 1]
    if alone:
        said.append(f"One seed: {', '.join(alone)}. How far another seed would differ is not known.")
    said.append(_of_puzzles(data, [arm["exact"]["mean"] for arm in arms.values()]))
    if data["training_sets"] > 1:
        said.append(f"The runs were trained on {data['training_sets']} different sets of puzzles.")
    depths = {name: arm["supervision_steps"] for name, arm in arms.items()}
    if len(set(depths.values())) > 1:
        said.append(f"Accuracies are after different supervision steps: {', '.join(f'{name} {step}' for name, step in depths.items())}.")
    if unfinished := [name for name, arm in arms.items() if arm["unfinished"]]:
        said.append(f"Runs of {', '.join(unfinished)} are unfinished: their accuracy is that of the last evaluation they had.")
    return said


def _of_puzzles(data: dict[str, Any], exact: Sequence[float]) -> str:
    """What so many validation puzzles can tell: the largest standard error, or, where all or none are solved, the rule of three."""
    count = data["evaluated_puzzles"]
    worst = max(math.sqrt(share * (1 - share) / count) for share in exact)
    bound = f"a standard error of up to {100 * worst:.1f} points"
    if worst == 0:
        bound = f"up to {300 / count:.1f} points (95 %, where none or all of {count:,} are solved)"
    return (
        f"Accuracies are of {count:,} of the {data['validation_puzzles']:,} validation puzzles ({data['game']}): other puzzles would move "
        f"them by {bound}, which spreads over seeds leave out."
    )


def _difference(pair: dict[str, Any], arms: dict[str, Any]) -> str:
    mine, its = arms[pair["arm"]]["exact"], arms[pair["against"]]["exact"]
    apart = mine["low"] > its["high"] or mine["high"] < its["low"]
    between = ""
    if min(mine["n"], its["n"]) > 1:
        between = " No seed of one lies among those of the other." if apart else " Their seeds overlap."
    return (
        f"Exact accuracy of {pair['arm']} less that of {pair['against']}: {100 * pair['difference']:+.1f} points ({percent(mine)} % over "
        f"{_seeds(mine['n'])}, {percent(its)} % over {_seeds(its['n'])}).{between}"
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _agreement(pair: dict[str, Any]) -> str:
    same = [name for name, found in pair["quantities"].items() if found["matched"]]
    other = [f"{name} ({found['ratio']:.3g} times)" for name, found in pair["quantities"].items() if not found["matched"]]
    return (
        f"{pair['arm']} against {pair['against']}: matched within {MATCHED:.0%}: {', '.join(same) or 'nothing'}; not matched: "
        f"{', '.join(other) or 'nothing'}."
    )


def markdown(document: dict[str, Any]) -> str:
    """compare.md."""
    valid = ("valid",) if has_valid(document) else ()
    head = (*ACCURACY_COLUMNS[:4], *valid, *ACCURACY_COLUMNS[4:])
    steps = list(dict.fromkeys(step for arm in document["arms"] for step in arm["by_step"]))
    depths = [[arm["name"], *(percent(arm["by_step"].get(step)) for step in steps)] for arm in document["arms"]]
    runs = [
        [run["arm"], str(run["seed"]), *_run_cells(run), f"{run['step']:,} of {run['total_steps']:,}", f"`{run['run']}`"]
        for run in document["runs"]
    ]
    parts = [
        "# Comparison of puzzle runs",
        "\n".join(f"- {said}" for said in document["findings"]),
        "## Accuracy, %",
        table(head, accuracy_rows(document)),
        NOTE.format(accuracy=100 * document["accuracy"]),
        "## Cost",
        table(COST_COLUMNS, cost_rows(document)),
        COST_NOTE,
        "## Exact accuracy by supervision steps, %",
        table(("arm", *steps), depths),
        "## Runs (accuracies in %)",
        table(("arm", "seed", "exact", "cells", "best", "at step", "FLOPs", "seconds", "steps", "folder"), runs),
        *(f"![{name.removesuffix('.png')}]({name})" for name in document["plots"]),
    ]
    return "\n\n".join(parts) + "\n"


def _run_cells(run: dict[str, Any]) -> list[str]:
    shares = [f"{100 * share:.1f}" for share in (run["exact"], run["cells"], run["best"]["exact"])]
    return [*shares, f"{run['best']['step']:,}", _short(run["flops"]["model"]), f"{run['seconds']:,.0f}"]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
