"""`attractor bench reasoning`: a training step and an evaluation step of puzzle models, what they cost and what their products cost alone.

    training step     refill, supervision step with gradient, backward, optimizer (fp32 masters beside bf16 weights)
    evaluation step   a supervision step without gradient; a puzzle takes `supervision.steps` of them
    floor             the blocks' matrix products alone, as often as the step needs them, forward and backward: torch.matmul on tensors of
                      the same shapes and precision. No implementation that computes all of them can be faster.

The step is the model's own: no engine, no data, no average of the weights. Puzzles are random tokens, so the weights learn nothing, and
what a solver takes is what it takes untrained. The published code, if given, takes every other turn in the same process on the same
puzzles; times are medians. CPU time stands beside wall time, because it hardly depends on who else uses the machine.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.cost import Work
from model.reasoning.cost import count_reasoner, reasoner_flops
from model.reasoning.reasoner import build
from model.reasoning.roles import parameter_roles
from model.reasoning.supervision import empty_carry, explore, refill, supervise
from pretrain.bench import known_peak, peak_memory, reset_peak, wait
from pretrain.optimizer import build_puzzle_optimizer
from pretrain.reasoning.bench_floor import Floor
from pretrain.reasoning.bench_published import Published
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.runtime import device_of

Row = dict[str, Any]
Times = list[tuple[float, float]]
SUDOKU_VOCABULARY, SUDOKU_CELLS = 11, 81  # of a recipe that leaves them to the data
_ON_CPU = 32  # puzzles: the published 768 would take minutes a step
_TURNS = 3  # at least


def bench_reasoning(recipes: list[PuzzleRecipe], seconds: float, batch: int | None = None, against: Path | None = None) -> list[Row]:
    """One row a recipe, each from a process of its own, so that none inherits another's memory; `seconds` of measured steps each.

    batch: puzzles a step; None takes train.micro_batch, on a CPU at most 32. against: a checkout of the published TRM code, which is timed
    beside every recipe of kind trm. Raises Refusal when it cannot be used."""
    return [_apart(recipe, seconds, batch, against if recipe.model.kind == "trm" else None) for recipe in recipes]


def _apart(recipe: PuzzleRecipe, seconds: float, batch: int | None, against: Path | None) -> Row:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_row, recipe, seconds, batch, against).result()


def _row(recipe: PuzzleRecipe, seconds: float, batch: int | None, against: Path | None) -> Row:
    m = recipe.model
    recipe = recipe.completed(m.vocabulary_size or SUDOKU_VOCABULARY, m.cells or SUDOKU_CELLS, m.identifiers, "random puzzles")
    device = device_of(recipe.train.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as runs do
    rows = batch or (recipe.train.micro_batch if device.type == "cuda" else min(_ON_CPU, recipe.train.micro_batch))
    puzzles = _random_puzzles(recipe, rows, device)
    ours = _Bench(recipe, puzzles, device)
    first = {"first_step_seconds": _timed(ours.step, device)[0]}
    reset_peak(device)
    ours.step()
    memory = peak_memory(device)
    sides: dict[str, _Bench | Published] = {"ours": ours}
    if against is not None:
        sides["published"] = Published(against, recipe, puzzles, device)
        first["published_first_step_seconds"] = _timed(sides["published"].step, device)[0]
    floor = Floor(recipe.architecture, rows, ours.dtype, device)
    training = _take_turns({**{name: side.step for name, side in sides.items()}, "floor": floor.measure}, seconds, device)
    evaluation = _take_turns({name: side.look for name, side in sides.items()}, seconds / 4, device)
    head: Row = {"recipe": recipe.run.name, "kind": m.kind, "device": device.type, "precision": recipe.train.precision}
    head |= {"compiled": recipe.train.compile, "threads": torch.get_num_threads(), "batch": rows, "positions": recipe.model.length}
    row = {**head, **_figures(recipe, ours, rows, training["ours"]), **first, "memory_bytes": memory}
    row["floor_seconds"], row["floor_cpu_seconds"] = floor.seconds(ours.work)
    row |= _evaluation(recipe, rows, evaluation["ours"])
    if "published" in sides:
        row["published"] = _published(sides["published"], recipe, rows, training, evaluation)
    return row


def _figures(recipe: PuzzleRecipe, ours: _Bench, rows: int, times: Times) -> Row:
    """What the training steps say."""
    seconds, cpu = _medians(times)
    spent = reasoner_flops(recipe.architecture, ours.work).model * rows * recipe.cells
    peak = recipe.train.peak_flops or known_peak(ours.device, recipe.train.precision)
    return {
        "parameters": count_reasoner(recipe.architecture).total,
        "solver_iterations": ours.mean("solver_iterations"),
        "evaluations": ours.work.evaluations,
        "applications": ours.work.applications,
        "repetitions": len(times),
        "step_seconds": seconds,
        "step_cpu_seconds": cpu,
        "steps_per_second": 1 / seconds,
        "puzzles_per_second": rows / seconds,
        "flops_per_step": spent,
        "flops_per_second": spent / seconds,
        "mfu": spent / seconds / peak if peak else None,
    }


def _evaluation(recipe: PuzzleRecipe, rows: int, times: Times) -> Row:
    seconds, cpu = _medians(times)
    rate = rows / (recipe.supervision.steps * seconds)
    return {"evaluation_step_seconds": seconds, "evaluation_step_cpu_seconds": cpu, "evaluation_puzzles_per_second": rate}


def _published(side: _Bench | Published, recipe: PuzzleRecipe, rows: int, training: dict[str, Times], evaluation: dict[str, Times]) -> Row:
    """What the published code took, and over ours: above 1, ours is faster."""
    seconds, cpu = _medians(training["published"])
    ours, ours_cpu = _medians(training["ours"])
    evaluated = _evaluation(recipe, rows, evaluation["published"])
    return {
        "step_seconds": seconds,
        "step_cpu_seconds": cpu,
        "steps_per_second": 1 / seconds,
        **evaluated,
        "over_ours": seconds / ours,
        "cpu_over_ours": cpu / ours_cpu,
        "evaluation_over_ours": evaluated["evaluation_step_seconds"] / _medians(evaluation["ours"])[0],
        "replaced": side.replaced if isinstance(side, Published) else [],
    }


def _random_puzzles(recipe: PuzzleRecipe, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, answers [rows, cells] uint8, identifiers [rows]): token 0 is padding and never occurs."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    tokens = torch.randint(1, recipe.model.vocabulary_size or 0, (2, rows, recipe.cells), dtype=torch.uint8, generator=generator)
    return tokens[0].to(device), tokens[1].to(device), torch.zeros(rows, dtype=torch.int64, device=device)


class _Bench:
    """A model in training and its optimizer, as a run has them: products in the recipe's precision, fp32 masters under the optimizer."""

    def __init__(self, recipe: PuzzleRecipe, puzzles: tuple[Tensor, Tensor, Tensor], device: torch.device) -> None:
        self.device, self.puzzles, self.supervision = device, puzzles, recipe.supervision
        self.dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self.master = build(recipe.architecture, device=device, seed=recipe.train.seed)
        rounded = self.dtype != torch.float32
        self.model = build(recipe.architecture, device=device, dtype=self.dtype, seed=recipe.train.seed) if rounded else self.master
        if recipe.train.compile:
            self.model.compile_maps()
        settings = recipe.optimizer.model_copy(update={"ema": None})
        self.optimizer = build_puzzle_optimizer(self.master, parameter_roles(self.master), settings, fused=device.type == "cuda")
        self.rows = puzzles[0].shape[0]
        self.carry = empty_carry(self.model.start(self.rows), recipe.cells)
        self.records: list[dict[str, Tensor]] = []

    def step(self) -> None:
        carry = refill(self.carry, *self.puzzles, self.model.start(self.rows))
        found = supervise(self.model, carry, self.supervision, explore(torch.rand(2, self.rows, device=self.device), self.supervision))
        self.carry = found.carry
        found.loss.backward()
        self._update()
        self.records.append(found.record)

    def mean(self, name: str) -> float:
        """Of a number in the record, over all steps so far; 0 where the kind of model has none."""
        found = [float(record[name]) for record in self.records if name in record]
        return sum(found) / len(found) if found else 0.0

    @property
    def work(self) -> Work:
        """What a sequence took on average."""
        return Work(self.mean("solver_evaluations"), self.mean("applications"), 0.0)

    def look(self) -> None:
        """An evaluation step of the puzzles under way."""
        with torch.no_grad():
            self.model(self.carry.latents, self.carry.inputs, self.carry.identifiers).logits.argmax(dim=-1)

    def _update(self) -> None:
        if self.model is self.master:
            self.optimizer.step()
        else:
            for own, master in zip(self.model.parameters(), self.master.parameters(), strict=True):
                master.grad = None if own.grad is None else own.grad.float()
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), list(self.master.parameters()))
        self.model.zero_grad(set_to_none=True)


def _take_turns(works: dict[str, Callable[[], None]], seconds: float, device: torch.device) -> dict[str, Times]:
    """(wall, CPU) seconds of every call: in turns, to and fro, until `seconds` are spent, at least three of each."""
    times: dict[str, Times] = {name: [] for name in works}
    begin, turn = time.perf_counter(), 0
    while turn < _TURNS or time.perf_counter() - begin < seconds:
        for name in works if turn % 2 else reversed(list(works)):
            times[name].append(_timed(works[name], device))
        turn += 1
    return times


def _timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _medians(times: Times) -> tuple[float, float]:
    return median(wall for wall, _ in times), median(cpu for _, cpu in times)
