"""Runs side by side: what each reached and what it cost, where one comes down to the other's loss, what is matched and what is not.

    records -> refuse what cannot be compared -> (newest checkpoints on the whole validation split) -> DIR/compare.{json,md}, DIR/*.png

The four numbers that make a comparison of losses mean something are total parameters, matmul parameters, tokens and FLOPs: each
pair says which of them agree within `MATCHED` and which do not. Without `evaluate` nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import compare_bootstrap as bootstrap
from pretrain.compare_curves import crossing, in_window, smoothed, window_tokens
from pretrain.compare_documents import Checkpoint, document_losses, newest_checkpoints
from pretrain.compare_plots import plot_comparison
from pretrain.compare_records import Curve, RunRecord, make_folder, own_loss, read_run, refuse_unlike
from pretrain.compare_report import MATCHED, QUANTITIES, findings, markdown
from pretrain.durable import write_atomically
from pretrain.errors import Refusal

REPORT, DOCUMENT = "compare.md", "compare.json"


def compare_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    evaluate: bool = True,
    names: Sequence[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Compares run folders and writes compare.md, compare.json and the plots into the folder `out`; returns the JSON document.

    evaluate: also the newest checkpoints, by document, on the whole validation split (kept in `out`, so that it is done once).
    names: what to call the runs; their folders' names otherwise. progress: told the share done, 0 to 1.

    Raises Refusal, before anything is written, for fewer than two runs, one given twice, folders that hold no run or no record, other
    tokenizers, sequence lengths or validation data, an `out` that is a file, and (with evaluate) a run without a whole checkpoint.
    """
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file. Give a folder; it is made where there is none.")
    records = [read_run(path, name) for path, name in zip(runs, _names(runs, names), strict=True)]
    refuse_unlike(records)
    checkpoints = newest_checkpoints(records) if evaluate else []
    make_folder(out)
    window = window_tokens([run.training for run in records])
    smooth = {run.name: smoothed(run.training, window) for run in records}
    document: dict[str, Any] = {
        "runs": [_describe(run, smooth[run.name], window) for run in records],
        "data": _data(records[0]),
        "smoothing": {"window_tokens": window, "records": {run.name: _in_last_window(run, window) for run in records}},
        "matched": [_matched(run, records[0]) for run in records[1:]],
        "crossings": _crossings(records, smooth),
        "documents": _documents(checkpoints, out, progress or (lambda _: None)) if evaluate else None,
    }
    document["plots"] = plot_comparison(records, smooth, out)
    document["findings"] = findings(document)
    write_atomically(out / DOCUMENT, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomically(out / REPORT, markdown(document))
    return document


def _names(runs: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """What each run is called: as told, or its folder's name with as much of the path as tells it from the others."""
    if len(runs) < 2:
        raise Refusal(f"A comparison needs at least two runs, not {len(runs)}: give two run folders or more.")
    whole = [path.resolve() for path in runs]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise Refusal(f"The run {twice} is given twice: it has nothing to be compared with but itself. Give each folder once.")
    if names is not None:
        if len(names) != len(runs) or len(set(names)) < len(names):
            raise Refusal(f"{len(runs)} runs need as many names, each its own, not {', '.join(names)}.")
        return list(names)
    parts = 1
    while len({path.parts[-parts:] for path in whole}) < len(whole):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in whole]


def _describe(run: RunRecord, smooth: Curve, window: float) -> dict[str, Any]:
    last = run.evaluations[-1] if run.evaluations else None
    return {
        "name": run.name,
        "run": str(run.path),
        "kind": run.recipe.model.kind,
        "step": run.step,
        "total_steps": run.total_steps,
        "finished": run.finished,
        "starts": [start["step"] for start in run.starts],
        "tokens": run.metrics[-1]["tokens"],
        "flops": run.flops(),
        "seconds": run.seconds,
        "parameters": run.parameters(),
        "training": {"loss": float(run.training.loss[-1]), "smoothed": float(smooth.loss[-1]), "tokens": float(run.training.tokens[-1])},
        "validation": last and _validation(last, run.recipe.model.solves),
        "solver_iterations": _iterations(run, window),
        "memory_bytes": max(record["memory_bytes"] for record in run.metrics),
        "skipped_steps": run.metrics[-1]["skipped_steps"],
        "seed": run.recipe.train.seed,
        "precision": run.recipe.train.precision,
        "mask_documents": run.recipe.data.mask_documents,
        "layout": run.layout(),
    }


def _validation(record: dict[str, Any], solves: bool) -> dict[str, Any]:
    depths = list(record["loss"])
    kept = ("iterations", "proposal_distance", "converged", "predicted_tokens", "step", "tokens")
    depth = "auto" if "auto" in depths else depths[-1]
    found = {"loss": own_loss(record), "depth": depth, "by_depth": record["loss"], **{key: record.get(key) for key in kept}}
    return found


def _iterations(run: RunRecord, window: float) -> dict[str, float] | None:
    """Iterations a sequence in training: mean over the first and the last window of tokens."""
    tokens, iterations = run.series("solver_iterations")
    if not len(tokens):
        return None
    first = iterations[: max(1, int(np.searchsorted(tokens, window, side="right")))]
    return {"first": float(np.mean(first)), "last": float(np.mean(iterations[in_window(tokens, window)[-1] :]))}


def _in_last_window(run: RunRecord, window: float) -> int:
    tokens = run.training.tokens
    return len(tokens) - int(in_window(tokens, window)[-1])


def _data(run: RunRecord) -> dict[str, Any]:
    split = run.validation_split
    return {
        "tokenizer_fingerprint": run.manifest.tokenizer_fingerprint,
        "sequence_length": run.sequence_length,
        "validation_index_sha256": split.index_sha256,
        "validation_documents": split.documents,
        "validation_tokens": split.tokens,
    }


def _matched(run: RunRecord, first: RunRecord) -> dict[str, Any]:
    """Every quantity of `run` over the first run's, and whether they agree."""
    own, its = _quantities(run), _quantities(first)
    ratios = {name: own[name] / its[name] for name in QUANTITIES}
    return {
        "run": run.name,
        "against": first.name,
        "quantities": {name: {"ratio": ratio, "matched": abs(ratio - 1) <= MATCHED} for name, ratio in ratios.items()},
    }


def _quantities(run: RunRecord) -> dict[str, float]:
    parameters, flops = run.parameters(), run.flops()
    numbers = (parameters["total"], parameters["matmul"], run.metrics[-1]["tokens"], flops["hardware"], flops["model"])
    return dict(zip(QUANTITIES, numbers, strict=True))


def _crossings(runs: Sequence[RunRecord], smooth: dict[str, Curve]) -> list[dict[str, Any]]:
    """For each loss and every ordered pair: where the first run reaches the second's final loss."""
    curves = {"validation": {run.name: run.validation for run in runs}, "training": smooth}
    return [
        {"curve": curve, "run": a.name, "reaches": b.name, **crossing(by_name[a.name], by_name[b.name])}
        for curve, by_name in curves.items()
        for b, a in permutations(runs, 2)
        if len(by_name[a.name].loss) and len(by_name[b.name].loss)
    ]


def _documents(checkpoints: Sequence[Checkpoint], out: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Losses of the newest checkpoints on the whole validation split, and the intervals of their differences."""
    parts = len(checkpoints) + 1
    found = [
        document_losses(checkpoint, out, lambda share, done=done: progress((done + share) / parts))  # type: ignore[misc]
        for done, checkpoint in enumerate(checkpoints)
    ]
    used = found[0].tokens > 0
    nll, tokens = np.stack([losses.nll[used] for losses in found]), found[0].tokens[used]
    losses = nll.sum(axis=1) / tokens.sum()
    resampled = bootstrap.resampled_losses(nll, tokens, progress=lambda share: progress((parts - 1 + share) / parts))
    names = [checkpoint.run.name for checkpoint in checkpoints]
    pairs = bootstrap.intervals(losses, resampled)
    return {
        "unit": "document: the predictions made from its tokens, across windows",
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "resamples": bootstrap.RESAMPLES,
        "seed": bootstrap.SEED,
        "level": bootstrap.LEVEL,
        "losses": {
            checkpoint.run.name: {"loss": float(loss), "step": checkpoint.step, "depth": told.depth}
            for checkpoint, loss, told in zip(checkpoints, losses, found, strict=True)
        },
        "differences": [{**pair, "run": names[pair["run"]], "minus": names[pair["minus"]]} for pair in pairs],
    }
