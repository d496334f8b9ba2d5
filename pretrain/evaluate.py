"""Validation loss by depth of the solve: 0 decodes the proposal, n takes n evaluations of f, auto solves to the tolerance.

    loss(T) = sum of next-token losses at depth T / predicted tokens;   perplexity = exp(loss)
    bits_per_byte(T) = sum of losses of tokens that stand for text / (ln 2 * bytes of those tokens)
    proposal_distance = ||y* - y0|| / ||y0||, mean over sequences, at the last depth that solves

One proposal serves all depths of a batch. The equilibrium is internalised when loss(0) or loss(1) comes near loss(auto).
With adaptive stopping a token's state may depend, within the tolerance, on later ones (the stop is the sequence's); `strict`
solves as generation with a cache would. pretrain/solvers.py measures how much leaks, by kind of mixing.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Batch, ValidationLoader
from data_pipeline.token_bytes import token_bytes
from model.loss import IGNORE
from model.refine import Depth
from pretrain.agreement import gather, rank
from pretrain.config import Recipe
from pretrain.errors import Refusal
from pretrain.mesh import ALONE, Mesh
from pretrain.runtime import device_of, settle_libraries
from pretrain.step import Found, to_device

_PER_SEQUENCE = ("proposal_distance", "iterations", "converged")

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: Callable[..., Any],
    batches: Iterable[Batch],
    depths: Sequence[Depth],
    device: torch.device,
    mesh: Mesh = ALONE,
    *,
    mask_documents: bool = False,
    text_bytes: Tensor | None = None,
) -> dict[str, Any]:
    """Losses by depth over all ranks' batches; the model is a LanguageModel in eval mode, or an engine around one. Collective.

    Returns {"loss": {depth: nats}, "perplexity": {...}, "tokens": predicted, "proposal_distance", "iterations": {depth: mean},
    "converged": share}; a Transformer has the one depth 0. With `text_bytes` (see `text_bytes_of`) also "bits_per_byte": {depth: x}.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
    order: list[str] = []
    for _, targets, record in forward(model, batches, depths, device, mesh, mask_documents=mask_documents):
        predicted = targets != IGNORE
        real = predicted.any(dim=1)  # rows that are not padding
        sums["predicted"] += predicted.sum()
        sums["sequences"] += real.sum()
        if text_bytes is not None:
            stands_for = text_bytes[targets.clamp_min(0)] * predicted
            sums["bytes"] += stands_for.sum()
        for key, value in record.items():
            name, _, depth = key.rpartition("/")
            if name == "nll":
                sums[key] += value.sum(dtype=torch.float64)
                if text_bytes is not None:
                    sums[f"text_nll/{depth}"] += (value * (stands_for > 0)).sum(dtype=torch.float64)
                order += [depth] if depth not in order else []
            elif name in _PER_SEQUENCE:
                sums[key] += value[real].sum(dtype=torch.float64)
    totals, order = _over_ranks(dict(sums) if mesh.tells else {}, order)
    return _report(totals, order)


def forward(
    model: Callable[..., Any],
    batches: Iterable[Batch],
    depths: Sequence[Depth],
    device: torch.device,
    mesh: Mesh = ALONE,
    *,
    mask_documents: bool = False,
) -> Iterator[Found]:
    """(loss at the last depth, targets, record) of every batch; on a pipeline, nothing but on its last stage. Collective."""
    if mesh.layout.pipeline > 1:
        from pretrain.stages import evaluate_batches

        yield from evaluate_batches(model, batches, depths, mask_documents)
        return
    for batch in batches:
        tokens, targets, documents = to_device(batch, device, mask_documents)
        loss, record = model(tokens, targets, documents, depths)
        yield loss, targets, record


def _over_ranks(sums: dict[str, Tensor], order: list[str]) -> tuple[dict[str, float], list[str]]:
    """The sums, and the depths, of all ranks that have something to say."""
    own = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}
    told = [(said, depths) for said, depths in gather((own, order)) if said]
    return {key: math.fsum(said[key] for said, _ in told) for key in told[0][0]}, told[0][1]


def _report(totals: dict[str, float], depths: list[str]) -> dict[str, Any]:
    losses = {depth: totals[f"nll/{depth}"] / max(1.0, totals["predicted"]) for depth in depths}
    report: dict[str, Any] = {
        "loss": losses,
        "perplexity": {depth: math.exp(min(loss, 700.0)) for depth, loss in losses.items()},
        "tokens": int(totals["predicted"]),
    }
    if totals.get("bytes"):
        report["bits_per_byte"] = {depth: totals[f"text_nll/{depth}"] / (math.log(2) * totals["bytes"]) for depth in depths}
    solved = [depth for depth in depths if f"iterations/{depth}" in totals]
    if solved:
        sequences = max(1.0, totals["sequences"])
        report["iterations"] = {depth: totals[f"iterations/{depth}"] / sequences for depth in solved}
        for name in ("proposal_distance", "converged"):
            if f"{name}/{solved[-1]}" in totals:  # a loop has no proposal to be near to
                report[name] = totals[f"{name}/{solved[-1]}"] / sequences
    return report


def text_bytes_of(recipe: Recipe, device: torch.device) -> Tensor | None:
    """Bytes of text that each token id of the recipe's first set stands for [v]; None, with a warning that says why, where its tokenizer
    does not tell them.
    """
    try:
        known = torch.from_numpy(token_bytes(recipe.sources[0][0], recipe.data.cache))
    except Refusal as reason:
        if rank() == 0:
            logger.warning("Evaluations have no bits per byte: %s", reason)
        return None
    table = torch.zeros(max(len(known), recipe.model.vocabulary_size or 0), dtype=torch.int32)
    table[: len(known)] = known
    return table.to(device)


def validation_loader(recipe: Recipe, data_rank: int, data_ranks: int, limit_tokens: int | None) -> ValidationLoader:
    """The validation split of the recipe's first set, shared out over the data ranks; all of it where there is no limit."""
    return ValidationLoader(
        recipe.sources[0][0],
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        data_rank=data_rank,
        data_ranks=data_ranks,
        limit_tokens=limit_tokens,
        cache=recipe.data.cache,
        vocabulary_limit=recipe.model.vocabulary_size,
    )


def evaluate_run(
    run: Path, iterations: Sequence[Depth] | None = None, *, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Evaluates the newest whole checkpoint of a run folder in this process, at the depths given or the recipe's own, on the whole
    validation split (evaluation.tokens bounds only what is evaluated during training).

    Raises Refusal for a folder without a run or a whole checkpoint.
    """
    settle_libraries(device_of("auto"))
    from pretrain.loaded import load_run

    loaded = load_run(run)
    recipe, device = loaded.recipe, loaded.device
    loader = validation_loader(recipe, 0, 1, None)
    batches: Iterable[Batch] = loader
    if progress is not None:
        batches = _told(loader, len(loader), progress)
    depths = list(iterations or recipe.evaluation.iterations)
    sizes = text_bytes_of(recipe, device)
    report = evaluate(loaded.model, batches, depths, device, mask_documents=recipe.data.mask_documents, text_bytes=sizes)
    return {"run": str(run), "kind": recipe.model.kind, "step": loaded.step, "weights": loaded.which, **report}


def _told(batches: Iterable[Batch], total: int, progress: Callable[[float], None]) -> Iterable[Batch]:
    for number, batch in enumerate(batches):
        yield batch
        progress((number + 1) / total)
