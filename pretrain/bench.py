"""`attractor bench step`: a training step by part, and what it holds, at fixed and at adaptive numbers of iterations, of a solver or a
loop. `attractor bench models`: all kinds of model side by side, as wide and with as many blocks.

The step is the model's own (no engine around it): forward, backward, clip, optimizer, on real text (Python's documentation
as bytes), so that the map learns and contracts as it does in a run. Parts are timed on a second pass that is cut by hand at
the proposal and at the equilibrium; they need not add up to `step_seconds` exactly.

    memory_bytes         height of the process (CPU: resident set) or of the GPU's allocator during the steps
    saved_bytes          what autograd keeps for backward, distinct storages, weights apart: the figure that must not depend
                         on the number of solver iterations
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Kind, LoopConfig, ModelConfig
from model.cost import Work, training_flops
from model.implicit import attach
from model.language_model import LanguageModel, build
from model.looped import Loop
from model.roles import parameter_roles
from pretrain.config import Recipe
from pretrain.ledger import peak_flops
from pretrain.optimizer import MuonAdamW, build_optimizer
from pretrain.runtime import device_of

Row = dict[str, Any]
DEFAULT_VOCABULARY, DEFAULT_LENGTH = 4096, 256


def bench_step(recipe: Recipe, iterations: Sequence[int | str], steps: int, warm_up: int = 10) -> list[Row]:
    """One row for every number of iterations, fixed or, for "auto", as the recipe solves or loops; a Transformer has one row, "none".

    Each row comes from a process of its own, so that none inherits another's memory. There the model is first trained for
    `warm_up` steps as the recipe solves.
    """
    names = iterations if recipe.model.solves or recipe.model.loops else ["none"]
    return [_apart(recipe, name, steps, warm_up) for name in names]


def bench_models(recipe: Recipe, steps: int, warm_up: int = 10) -> list[Row]:
    """One row for every kind of model, with the recipe's width and as many blocks as its backbone and attractor together, every one on
    the same attention, loss, optimizer and compile path."""
    return [{"kind": kind, **_apart(each, "auto", steps, warm_up)} for kind, each in side_by_side(recipe).items()]


def side_by_side(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe as each kind of model: a Parcae loops a third of its blocks, a looped Transformer all of them, twice."""
    solved, m = recipe.attractor.layers, recipe.model
    blocks = m.backbone_layers + solved if m.solves else m.backbone_layers
    third = max(1, blocks // 3)
    before = max(1, blocks - solved)
    made: dict[Kind, tuple[int, LoopConfig]] = {
        "transformer": (blocks, recipe.loop),
        "parcae": (blocks, replace(recipe.loop, core=third, coda=min(third, blocks - third))),
        "looped": (blocks, LoopConfig(core=blocks, coda=0, iterations=2)),
        "deq": (before, recipe.loop),
        "attractor": (before, recipe.loop),
    }
    return {
        kind: recipe.model_copy(update={"model": replace(m, kind=kind, backbone_layers=layers), "loop": loop})
        for kind, (layers, loop) in made.items()
    }


def _apart(recipe: Recipe, name: int | str, steps: int, warm_up: int) -> Row:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_row, recipe, name, steps, warm_up).result()


def _row(recipe: Recipe, name: int | str, steps: int, warm_up: int) -> Row:
    bench = _Bench(recipe)
    for _ in range(warm_up):
        bench.step()
    if isinstance(name, int):
        bench.fix(name)
    return bench.row(name, steps)


class _Bench:
    """A model in training, its data and its optimizer."""

    def __init__(self, recipe: Recipe) -> None:
        vocabulary = recipe.model.vocabulary_size or DEFAULT_VOCABULARY
        self.recipe, self.device = recipe, device_of(recipe.train.device)
        self.config: ModelConfig = replace(recipe.architecture, model=replace(recipe.model, vocabulary_size=vocabulary))
        self.length = recipe.data.sequence_length or DEFAULT_LENGTH
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self.model: LanguageModel = build(
            self.config, device=self.device, dtype=dtype, seed=recipe.train.seed, recompute=recipe.train.recompute
        )
        if recipe.train.compile:
            self.model.compile_maps()
        fused = self.device.type == "cuda"
        self.optimizer: MuonAdamW = build_optimizer(self.model, parameter_roles(self.model), recipe.optimizer, fused=fused)
        self.optimizer.guard_gradients(recipe.optimizer.clip)
        self.batches = text_batches(recipe.train.micro_batch, self.length, vocabulary, self.device)

    def fix(self, iterations: int) -> None:
        """From now on every solve takes so many evaluations, every loop so many iterations."""
        refine = self.model.refine
        if isinstance(refine, Loop):
            refine.mean, refine.draws = iterations, False
        elif refine is not None:
            refine.solver = replace(refine.solver, min_iterations=iterations, max_iterations=iterations)

    def step(self) -> tuple[float, float, float]:
        """(evaluations, applications, vector-Jacobian products) a sequence of one whole step."""
        tokens, targets = next(self.batches)
        loss, record = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        evaluations, applications, products = (float(record.get(key, 0)) for key in ("solver_evaluations", "applications", "products"))
        return evaluations, applications, products

    def row(self, name: int | str, steps: int) -> Row:
        self.step()  # kernels and allocator get used to this shape
        reset_peak(self.device)
        seconds, found = [], []
        for _ in range(steps):
            elapsed, result = _timed(self.step, self.device)
            seconds.append(elapsed)
            found.append(result)
        height = peak_memory(self.device)
        typical = sorted(seconds)[len(seconds) // 2]
        work = Work(*(sum(column) / steps for column in zip(*found, strict=True)))
        tokens = self.recipe.train.micro_batch * self.length
        spent = training_flops(self.config, self.length, work, recompute=self.recipe.train.recompute)
        peak = self.recipe.train.peak_flops or known_peak(self.device, self.recipe.train.precision)
        return {
            "iterations": name,
            "evaluations": work.evaluations,
            "applications": work.applications,
            "step_seconds": typical,
            "tokens_per_second": tokens / typical,
            "memory_bytes": height,
            "saved_bytes": self._saved(),
            **{f"{part}_seconds": elapsed for part, elapsed in self._parts(steps).items()},
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_flops_per_token": spent.model,
            "model_flops_per_second": spent.model * tokens / typical,
            "mfu": spent.model * tokens / typical / peak if peak else None,
        }

    def _saved(self) -> int:
        tokens, targets = next(self.batches)
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = self.model(tokens, targets)
        del loss
        return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)

    def _parts(self, steps: int) -> dict[str, float]:
        """Median seconds of each part over `steps` steps that are cut apart."""
        runs = [self._one_cut_step() for _ in range(steps)]
        return {part: sorted(run[part] for run in runs)[steps // 2] for part in runs[0]}

    def _one_cut_step(self) -> dict[str, float]:
        tokens, targets = next(self.batches)
        model, device, times = self.model, self.device, {}
        times["backbone"], (proposal, context) = _timed(lambda: model.propose(tokens, None), device)
        hidden = proposal
        y0 = proposal.detach().requires_grad_()
        if isinstance(model.refine, Loop):
            loop = model.refine
            times["loop"], refined = _timed(lambda: loop(y0, context), device)
            hidden = refined.output
        elif model.refine is not None:
            refine, y0 = model.refine, proposal.detach().float().requires_grad_()
            with torch.no_grad():
                times["solve"], refined = _timed(lambda: refine(y0, context), device)
            times["application"], attached = _timed(
                lambda: attach(
                    lambda y: refine.attractor(y, y0, context), refined.output, refine.gradient, refine.solver, refine.recompute
                ),
                device,
            )
            hidden = attached.output
        cut = hidden.detach().requires_grad_()

        def head() -> None:
            model.predict(cut, targets).backward()

        times["head"], _ = _timed(head, device)
        if model.refine is not None:
            times["loop_backward" if "loop" in times else "implicit_backward"], _ = _timed(lambda: hidden.backward(cut.grad), device)
            assert y0.grad is not None
            gradient = y0.grad.to(proposal.dtype)
        else:
            gradient = cut.grad
        backward, _ = _timed(lambda: proposal.backward(gradient), device)
        times["backbone"] += backward
        times["optimizer"], _ = _timed(self.optimizer.step, device)
        self.optimizer.zero_grad(set_to_none=True)
        return times


def text_batches(batch: int, length: int, vocabulary: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, targets) [batch, length] from English bytes, taken modulo the vocabulary."""
    from pydoc_data.topics import topics

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long() % vocabulary
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        windows = text[starts + torch.arange(length + 1)].to(device)
        yield windows[:, :-1], windows[:, 1:]


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """From now on `peak_memory` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak of the resident set to what it is now


def peak_memory(device: torch.device) -> int:
    """Bytes: the height of this process (CPU) or of the GPU's allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def known_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a GPU, where its name is known."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
