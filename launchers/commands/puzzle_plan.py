"""`attractor plan` of a puzzle recipe: tables of at most 80 columns, or JSON. What they hold is in launchers/puzzle_plan.py.

Refused: what `plan` can do for language models alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from launchers.output import console, deliver, si, size
from launchers.puzzle_plan import PuzzlePlan, make_puzzle_plan
from pretrain.config import PuzzleRecipe
from pretrain.errors import Refusal
from pretrain.recipe_files import REASONING_REGIME, regime_of

_KINDS = {
    "total": "all of them",
    "matmul": "matrices of blocks: they cost FLOPs",
    "embedding": "tokens, puzzle embedding, learned positions",
    "backbone": "blocks, of both networks where there are two",
    "attractor": "blocks of the solved map",
    "head": "answer and halting head",
}
_PARTS = {
    "head_forward": "heads, forward",
    "head_backward": "heads, backward",
    "backbone_forward": "blocks, forward",
    "backbone_backward": "blocks, backward",
    "solve": "applications without gradient",
    "application": "applications with gradient",
    "implicit_backward": "their backward",
    "recomputation": "attention scores again, in backward",
}
_BYTES = {
    "weights": "in the precision of training",
    "gradients": "fp32",
    "optimizer": "masters, moments, average of weights: fp32",
    "latents": "carried, of all puzzles under way",
    "activations": "last cycle, one micro-batch: an estimate",
    "solver": "states and differences, fp32",
    "total": "",
}


def refuse_puzzles(recipes: Sequence[str], by: str | None, recommend: bool, hardware: str | None) -> None:
    """Raises Refusal where an option that is given is for language models alone, and a recipe is of puzzles."""
    given = "--match" if by is not None else "--recommend" if recommend else "--hardware" if hardware is not None else None
    puzzles = [name for name in recipes if given and regime_of(name, Path.cwd()) == REASONING_REGIME]
    if not puzzles:
        return
    instead = {
        "--match": f"Plan each recipe by itself (attractor plan {puzzles[0]}), and bring them together by model.width and train.steps",
        "--recommend": f"Puzzle models are data parallel, so there is no layout to choose: attractor plan {puzzles[0]} --gpus N",
        "--hardware": "The model of step time is of language models. Measure with `attractor bench reasoning`",
    }
    raise Refusal(f"{given} is for language models, and {puzzles[0]} is a recipe of puzzles. {instead[str(given)]}.")


def plan_puzzles(recipe: PuzzleRecipe, gpus: int | None, as_json: bool) -> None:
    """Prints the plan."""
    if as_json:
        deliver(True, lambda: make_puzzle_plan(recipe, gpus).as_dict(), lambda _: None)
    else:
        show_puzzles(make_puzzle_plan(recipe, gpus))


def show_puzzles(plan: PuzzlePlan) -> None:
    """Prints the tables."""
    out = console()
    out.print(
        f"[bold]{plan.recipe}[/]: {plan.kind}, {plan.cells} cells ({plan.positions} positions), vocabulary {plan.vocabulary_size}, "
        f"{plan.precision}",
        highlight=False,
    )
    where = f"On each of {plan.gpus} ranks" if plan.gpus > 1 else "On one rank"
    stays = f"A puzzle stays for up to {plan.supervision_steps} steps" if plan.supervision_steps > 1 else "A puzzle stays for one step"
    tables: tuple[tuple[Table, str | None], ...] = (
        (_parameters(plan), None),
        (
            _flops(plan),
            "Applications of the network, without and with gradient. Training is what the method needs; hardware adds what backward "
            "computes again. Inference is a forward pass that takes as many iterations.",
        ),
        (_parts(plan), None),
        (
            _memory(plan),
            f"{where}, for train.micro_batch={plan.batch['micro_batch']}; the recipe says ZeRO {plan.zero}. Buffers come on top.",
        ),
        (_run(plan), f"A step is one supervision step of every puzzle under way. {stays}."),
    )
    for table, note in tables:
        out.print()
        out.print(table)
        if note is not None:
            out.print(note, style="dim", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _parameters(plan: PuzzlePlan) -> Table:
    table = _table("Parameters", "kind", "number", "what")
    table.columns[2].justify = "left"
    for kind, what in _KINDS.items():
        if plan.parameters[kind] or kind == "total":
            table.add_row(kind, si(plan.parameters[kind]), what)
    return table


def _flops(plan: PuzzlePlan) -> Table:
    table = _table("FLOPs a puzzle and supervision step", "iterations", "without", "with", "inference", "training", "hardware", "a step")
    for row in plan.flops:
        expected = row.iterations is not None and row.iterations == plan.expected_iterations
        name = "none solved" if row.iterations is None else f"{row.iterations:g}"
        numbers = [f"{row.evaluations:g}", f"{row.applications:g}", *map(si, (row.inference, row.training, row.hardware, row.step))]
        table.add_row(f"{name} (expected)" if expected else name, *numbers, style="bold" if expected else None)
    return table


def _parts(plan: PuzzlePlan) -> Table:
    row = plan.expected
    at = "" if row.iterations is None else f" at {row.iterations:g} iterations"
    table = _table(f"Parts of a training step{at}", "part", "FLOPs a puzzle", "share of hardware")
    for part, what in _PARTS.items():
        if row.parts[part]:
            table.add_row(what, si(row.parts[part]), f"{row.parts[part] / row.hardware:.1%}")
    return table


def _memory(plan: PuzzlePlan) -> Table:
    table = _table("Memory a rank", "", *(f"ZeRO {stage}" for stage in plan.memory), "what")
    table.columns[-1].justify = "left"
    for part, what in _BYTES.items():
        table.add_row(part, *(size(parts[part]) for parts in plan.memory.values()), what, style="bold" if part == "total" else None)
    return table


def _run(plan: PuzzlePlan) -> Table:
    batch = plan.batch
    table = _table("Run", "", "number", "how")
    table.columns[2].justify = "left"
    ranks = f"{batch['data_ranks']} rank{'s' if batch['data_ranks'] > 1 else ''}"
    how = f"{batch['micro_batch']} a micro-batch x {batch['accumulation']} accumulated x {ranks}"
    table.add_row("puzzles under way", f"{batch['global_batch']:,}", how)
    table.add_row("cells a step", f"{batch['cells_per_step']:,}", f"x {plan.cells} cells: the tokens of the ledger")
    table.add_row("steps", f"{batch['steps']:,}", f"{batch['puzzle_steps']:,} supervision steps of puzzles")
    iterations = "" if plan.expected_iterations is None else f" at {plan.expected_iterations:g} iterations"
    table.add_row("training FLOPs", si(plan.run_flops, "FLOP"), f"of {batch['cells']:,} cells{iterations}")
    return table
