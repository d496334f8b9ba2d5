"""Whether an exported model is the training model: logits in fp32, before anything is written, and tensors bit by bit, after.

    difference(T) = max |logits - exported logits| / max(1, max |logits|)      at T = 0, 1 and auto, on random tokens and on a real prompt

Two correct implementations differ by fp32's rounding, which grows with the size of the logits: about 1e-6 here. TOLERANCE is the bound,
absolute for logits up to 1, relative to the largest beyond.

`auto` is compared at a solver tolerance of at most SOLVED. At a coarse one a token whose residual happens to fall on it may take an
evaluation more in one of the two; they would then differ by that tolerance, which says nothing about the weights. A map that does not
contract multiplies rounding at every evaluation, and two correct solves end apart: where they do, and not every token comes within the
run's own tolerance, the first evaluations of the solve are compared instead, and reported as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.refine import Refine
from pretrain import durable
from pretrain.errors import Refusal
from pretrain.tensor_files import TensorFiles

TOLERANCE = 1e-4
SOLVED = 1e-6
_LENGTH = 32
_FEW = 4
"""Evaluations of a solve that need not converge."""


def check_prompts(rows: int, prompt: Sequence[int], length: int) -> list[Tensor]:
    """Two random sequences of tokens, and a real one, [b, s] of at most `length` tokens."""
    length = min(_LENGTH, length or _LENGTH)
    random = torch.randint(0, rows, (2, length), generator=torch.Generator().manual_seed(0))
    return [random, torch.tensor([list(prompt[:length])])]


@torch.no_grad()
def compare_logits(
    model: LanguageModel, exported: Any, prompts: Sequence[Tensor], depths: Sequence[int | str], *, plain: bool = False
) -> dict[str, float]:
    """The largest difference at each depth, over the prompts. plain: `exported` knows no depth. Raises Refusal for one above TOLERANCE."""
    compared: dict[str, float] = {}
    for depth in depths:
        name, difference = str(depth), _difference(model, exported, prompts, depth, plain, None)
        if depth == "auto" and difference > TOLERANCE and not _converges(model, prompts):
            name, difference = f"{_FEW} of auto", _difference(model, exported, prompts, depth, plain, _FEW)
        if difference > TOLERANCE:
            raise Refusal(
                f"The exported model is not the trained one: at {name} solver iterations their logits differ by {difference:.1e}, where "
                f"rounding explains 1e-6 and at most {TOLERANCE:.0e} is accepted. Nothing was written. This is a fault of the export "
                f"(or of weights that are not finite: see `attractor evaluate`), not of the command."
            )
        compared[name] = difference
    return compared


def _difference(model: LanguageModel, exported: Any, prompts: Sequence[Tensor], depth: int | str, plain: bool, most: int | None) -> float:
    """most: evaluations that a solve takes at most; None leaves that as configured."""
    largest = 0.0
    with _solved(model, exported, most) if isinstance(model.refine, Refine) and not plain else nullcontext():
        for tokens in prompts:
            wanted = model.logits(tokens, depth="strict" if depth == "auto" else depth)
            found = exported(tokens, use_cache=False, **({} if plain else {"solver_iterations": depth})).logits
            difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1))
            largest = max(largest, float("inf") if math.isnan(difference) else difference)
    return largest


def _converges(model: LanguageModel, prompts: Sequence[Tensor]) -> bool:
    """Whether every token comes within the run's own tolerance."""
    if not isinstance(model.refine, Refine):
        return True
    solutions = [model.refine(*model.propose(tokens, None), "strict").solution for tokens in prompts]
    return all(solution is not None and bool(solution.converged.all()) for solution in solutions)


@contextmanager
def _solved(model: LanguageModel, exported: Any, most: int | None) -> Iterator[None]:
    """Both solve to SOLVED or below while it lasts."""
    assert isinstance(model.refine, Refine)
    ours, theirs, section = model.refine.solver, exported.config.solver_tolerance, exported.config.solver
    tolerance, limit = min(SOLVED, ours.tolerance), min(most or ours.max_iterations, ours.max_iterations)
    model.refine.solver = replace(ours, tolerance=tolerance, max_iterations=limit, min_iterations=min(ours.min_iterations, limit))
    exported.config.solver_tolerance = tolerance
    exported.config.solver = section | {"max_iterations": limit, "min_iterations": min(ours.min_iterations, limit)}
    try:
        yield
    finally:
        model.refine.solver, exported.config.solver_tolerance, exported.config.solver = ours, theirs, section


def read_back(
    folder: Path, files: Sequence[Path], shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], progress: Callable[[float], None]
) -> dict[str, str]:
    """Reads the tensors of the written `files` back, two files at a time; returns the SHA-256 of every file of the folder, by name.

    Raises Refusal unless they hold what `read` gives, bit by bit, and nothing else.
    """

    def check(file: Path) -> list[str]:
        with TensorFiles(folder, file.stem) as written:
            for name, shape in written.shapes.items():
                if name not in shapes or not _same_bits(written.read(name), read(name), shape.dtype):
                    raise Refusal(f"{name} came back from the disk changed. Nothing was exported; check the disk, then try again.")
            return list(written.shapes)

    found: list[str] = []
    shards = [file for file in files if file.suffix == ".safetensors"]
    with ThreadPoolExecutor(2) as pool:
        hashes = {path.name: pool.submit(durable.sha256, path) for path in sorted(folder.iterdir())}
        for number, names in enumerate(pool.map(check, shards)):
            found += names
            progress((number + 1) / len(shards))
        if sorted(found) != sorted(shapes):
            raise Refusal("The weights came back from the disk incomplete. Nothing was exported; check the disk, then try again.")
        return {name: future.result() for name, future in hashes.items()}


def _same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """A number that is not finite equals itself here."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return a.dtype == b.dtype == dtype and a.shape == b.shape and torch.equal(a.view(whole), b.view(whole))
