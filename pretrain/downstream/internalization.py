"""Internalization: how near the proposal already is to what the solve makes of it, on a run's validation split.

    T                    depth: 0 decodes the proposal, n takes n evaluations of f, auto solves each to the tolerance (model/strict.py)
    loss(T), accuracy(T) of the next token
    agreement(T)         share of predicted tokens whose most likely token at T is the one at auto
    divergence(T)        mean KL(p_auto || p_T) in nats
    proposal distance    ||y* - y0|| / ||y0||, mean over sequences
    iterations(token)    evaluations of f until the token's own residual ||f(y) - y|| / ||y|| first was below the tolerance, in the strict
                         solve; all that were made, for a token that never came there

by position in the window and by frequency of the token at the position. Frequencies are counted on what is evaluated here, a sample of the
training text that was held out: tokens are put in the order of their counts and cut into ten parts that each have a tenth of the text.

A deep equilibrium model has no proposal: its T = 0 is its start. A loop (parcae, looped) converges to nothing: its auto is its own count,
and it is reported by iterations alone. A Transformer is refused. Logits are computed for some tokens at a time.

Shapes: tokens, targets [b, s]; m predicted tokens of a batch; hidden [m, w].
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.fixed_point import token_residual
from model.language_model import LanguageModel
from model.loss import IGNORE
from model.refine import Refine
from pretrain import durable
from pretrain.errors import Refusal
from pretrain.evaluate import validation_loader
from pretrain.run_folder import dump
from pretrain.runtime import device_of, settle_libraries
from pretrain.step import to_device

REPORT = "internalization.json"
PICTURE = "internalization.png"
DEPTHS = (0, 1, 2, 4)
PARTS = 10
_LOGITS_AT_ONCE = 1 << 24
"""Elements, of each depth."""

logger = logging.getLogger(__name__)


class TokenCounts:
    """Heard at every evaluation of f: how many each token took until its own residual was below the tolerance."""

    def __init__(self, tolerance: float, least: int) -> None:
        self.tolerance, self.least, self.taken = tolerance, least, 0
        self.iterations = self.settled = torch.empty(0)

    def __call__(self, _: Any, inputs: tuple[Any, ...], value: Tensor) -> None:
        y = inputs[0]
        if self.taken == 0:
            self.iterations = torch.zeros(y.shape[:2], dtype=torch.int64, device=y.device)
            self.settled = torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
        self.taken += 1
        self.iterations += ~self.settled
        if self.taken >= self.least:
            self.settled |= token_residual(value.to(y.dtype) - y, y) < self.tolerance


@contextmanager
def counted(refine: Refine) -> Iterator[TokenCounts]:
    """Counts the evaluations of the one solve made inside."""
    counts = TokenCounts(refine.solver.tolerance, refine.solver.min_iterations)
    handle = refine.attractor.register_forward_hook(counts)
    try:
        yield counts
    finally:
        handle.remove()


class Sums:
    """What was found so far: scalars by name, and sums over tokens by position [s] and by token id [v]."""

    def __init__(self, length: int, vocabulary: int, device: torch.device) -> None:
        self.scalars: dict[str, float] = defaultdict(float)
        self.position: dict[str, Tensor] = defaultdict(lambda: torch.zeros(length, dtype=torch.float64, device=device))
        self.token: dict[str, Tensor] = defaultdict(lambda: torch.zeros(vocabulary, dtype=torch.float64, device=device))

    def add(self, found: dict[str, Tensor], positions: Tensor, tokens: Tensor) -> None:
        """found: a figure of each of the m predicted tokens, by name."""
        for name, values in found.items():
            self.scalars[name] += float(values.sum(dtype=torch.float64))
            self.position[name].index_add_(0, positions, values.double())
            self.token[name].index_add_(0, tokens, values.double())


@torch.no_grad()
def add_batch(sums: Sums, model: LanguageModel, tokens: Tensor, targets: Tensor, documents: Tensor | None, depths: Sequence[int]) -> None:
    """The figures of one batch at each depth and at auto."""
    assert model.refine is not None
    proposal, context = model.propose(tokens, documents)
    predicted = targets != IGNORE
    states = {str(depth): model.refine(proposal, context, depth).output[predicted] for depth in depths}
    found: dict[str, Tensor] = {"tokens": torch.ones(int(predicted.sum()), device=tokens.device)}
    if isinstance(model.refine, Refine):
        with counted(model.refine) as counts:
            refined = model.refine(proposal, context, "strict")
        found |= {"iterations": counts.iterations[predicted].float(), "converged": counts.settled[predicted].float()}
        if refined.distance is not None:
            sums.scalars["proposal_distance"] += float(refined.distance[predicted.any(dim=1)].sum(dtype=torch.float64))
    else:
        refined = model.refine(proposal, context, "auto")
    states["auto"] = refined.output[predicted]
    sums.scalars["sequences"] += int(predicted.any(dim=1).sum())
    found |= compared({name: model.norm(state) for name, state in states.items()}, model.unembedding, targets[predicted])
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[predicted]
    sums.add(found, positions, tokens[predicted])


def compared(hidden: dict[str, Tensor], weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """loss, accuracy, agreement and divergence of each token [m], by "<figure>/<depth>"; hidden: normed states by depth, auto's last."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    size = max(1, _LOGITS_AT_ONCE // weight.shape[0])
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logs = {name: torch.log_softmax((state[part] @ weight.T).float(), dim=-1) for name, state in hidden.items()}
        final = logs["auto"]
        choice, probability = final.argmax(dim=-1), final.exp()
        for name, log in logs.items():
            top = log.argmax(dim=-1)
            parts[f"loss/{name}"].append(-log.gather(-1, targets[part, None])[:, 0])
            parts[f"accuracy/{name}"].append((top == targets[part]).float())
            parts[f"agreement/{name}"].append((top == choice).float())
            parts[f"divergence/{name}"].append((probability * (final - log)).sum(dim=-1))
    return {name: torch.cat(values) for name, values in parts.items()}


def totals(sums: Sums, depths: Sequence[str]) -> dict[str, Any]:
    """The report's figures: by depth, of the solve, by position and by frequency."""
    count = max(1.0, sums.scalars["tokens"])
    report: dict[str, Any] = {"tokens": int(count), "sequences": int(sums.scalars["sequences"])}
    for figure in ("loss", "accuracy", "agreement", "divergence"):
        report[figure] = {depth: sums.scalars[f"{figure}/{depth}"] / count for depth in depths}
    report["perplexity"] = {depth: math.exp(min(loss, 700.0)) for depth, loss in report["loss"].items()}
    if "proposal_distance" in sums.scalars:
        report["proposal_distance"] = sums.scalars["proposal_distance"] / max(1.0, sums.scalars["sequences"])
    if "iterations" in sums.scalars:
        report |= {name: sums.scalars[name] / count for name in ("iterations", "converged")}
        report["by_position"] = by_position(sums.position)
        report["by_frequency"] = by_frequency(sums.token)
    return report


def by_position(position: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Ranges 0, 1, 2-3, 4-7, ... of the window."""
    length = len(position["tokens"])
    edges = [0, *(1 << power for power in range(length.bit_length())), length]
    edges = sorted({edge for edge in edges if edge <= length})
    found = []
    for first, end in pairwise(edges):
        means = _means({name: values[first:end].sum() for name, values in position.items()})
        if means is not None:
            found.append({"first": first, "last": end - 1, **means})
    return found


def by_frequency(token: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Ten parts of the text, from its most frequent tokens to its rarest; a token is in the part in which its middle lies."""
    counts, order = token["tokens"].sort(descending=True, stable=True)
    met = counts > 0
    counts, order = counts[met], order[met]
    middle = (counts.cumsum(0) - counts / 2) / counts.sum()
    part = (middle * PARTS).long().clamp_max(PARTS - 1)
    found = []
    for number in range(PARTS):
        ids = order[part == number]
        means = _means({name: values[ids].sum() for name, values in token.items()})
        if means is not None:
            found.append({"part": number + 1, "entries": len(ids), "rarest_count": int(token["tokens"][ids].min()), **means})
    return found


def _means(sums: dict[str, Tensor]) -> dict[str, Any] | None:
    """The figures of a group of tokens; None of an empty one."""
    count = float(sums["tokens"])
    if count == 0:
        return None
    named = {"iterations": "iterations", "agreement": "agreement/0", "loss_0": "loss/0", "loss_auto": "loss/auto"}
    return {"tokens": int(count), **{name: float(sums[key]) / count for name, key in named.items()}}


def report_internalization(
    run: Path, out: Path, depths: Sequence[int] = DEPTHS, limit: int | None = None, *, progress: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """Of a run's newest whole checkpoint, on at most `limit` windows of its validation split; also in OUT/internalization.json and .png.

    Raises Refusal for a Transformer, and for a folder without a run or a whole checkpoint.
    """
    settle_libraries(device_of("auto"))
    from pretrain.downstream.internalization_plot import plot_internalization
    from pretrain.loaded import load_run, recipe_of

    recipe = recipe_of(run)
    kind = recipe.model.kind
    if kind == "transformer":
        raise Refusal(
            f"{run} is a Transformer: it solves nothing, so there is nothing to internalise. Give the run of another kind of model."
        )
    loaded = load_run(run)
    length = loaded.sequence_length
    loader = validation_loader(recipe, 0, 1, None if limit is None else limit * length)
    sums = Sums(loader.sequence_length, loaded.model.unembedding.shape[0], loaded.device)
    depths = sorted({0, *depths})
    for number, batch in enumerate(loader):
        add_batch(sums, loaded.model, *to_device(batch, loaded.device, recipe.data.mask_documents), depths)
        progress((number + 1) / len(loader))
    solver = recipe.architecture.solver
    about = {"run": str(run), "kind": kind, "step": loaded.step, "weights": loaded.which, "tolerance": solver.tolerance}
    report: dict[str, Any] = about | totals(sums, [*map(str, depths), "auto"])
    report["files"] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        report["files"] = [str(out / REPORT), str(plot_internalization(report, out / PICTURE))]
        durable.write_atomically(out / REPORT, dump(report, indent=1) + "\n")
    except OSError as error:  # the figures are worth more than their copy
        report["files"] = []
        logger.warning("%s could not be written: %s", out / REPORT, error.strerror)
    return report
