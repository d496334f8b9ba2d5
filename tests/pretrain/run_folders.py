"""Run folders made by hand: records with known losses and costs, and a manifest in the place of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.manifest import Manifest, Split
from pretrain.config import load_recipe

STEP_TOKENS = 64  # 4 sequences of 16
_SPLIT = Split(documents=9, tokens=170, bytes=600, windows=10, largest_id=299, largest_id_sample=0, index_sha256="a" * 64)


def write_manifest(folder: Path, *, fingerprint: str = "f" * 64, sequence_length: int = 16, validation: str = "a" * 64) -> Path:
    """A prepared set that has nothing but its manifest."""
    folder.mkdir(parents=True)
    splits = {"train": _SPLIT, "validation": replace(_SPLIT, index_sha256=validation)}
    manifest = Manifest(sequence_length, 300, 0, "uint16", fingerprint, ["text"], splits)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    run: Path,
    data: Path,
    loss: Callable[[float], float | None],
    *,
    steps: int = 100,
    every: int = 1,
    evaluations: int = 10,
    depths: Sequence[str] = ("0",),
    reached: int | None = None,
    flops_a_token: float = 10.0,
    seconds_a_step: float = 0.5,
    overrides: Sequence[str] = (),
    summary: bool = True,
    predicted: int = 160,
) -> Path:
    """A run of `steps` steps that stopped at `reached` (None: the end). Its training loss after t tokens is loss(t), its validation loss
    at the last of `depths` too, and 0.1 more for each depth before that.
    """
    run.mkdir(parents=True)
    length = json.loads((data / "manifest.json").read_text())["sequence_length"]
    settings = [f"data.path={data}", f"train.tokens={steps * STEP_TOKENS}", f"data.sequence_length={length}", "train.global_batch=4"]
    settings += ["train.micro_batch=2", "model.vocabulary_size=320", "model.width=32", "model.heads=2", "model.backbone_layers=2"]
    recipe = load_recipe("demo" if len(depths) > 1 else "demo-transformer", [*settings, *overrides])
    (run / "config.yaml").write_text(recipe.to_yaml())
    end = reached or steps
    solver = {"solver_iterations": 3.0} if len(depths) > 1 else {}
    metrics = [
        {
            "step": step,
            "tokens": step * STEP_TOKENS,
            "loss": loss(step * STEP_TOKENS),
            "step_seconds": seconds_a_step,
            "flops_total": step * STEP_TOKENS * flops_a_token,
            "flops_step": STEP_TOKENS * flops_a_token,
            "flops_parts": {"recomputation": STEP_TOKENS * flops_a_token / 10},
            "memory_bytes": 2**30,
            "skipped_steps": 0,
            **solver,
        }
        for step in range(every, end + 1, every)
    ]
    write_lines(run / "metrics.jsonl", metrics)
    told = [step for step in range(evaluations, end + 1, evaluations)] if evaluations else []
    write_lines(run / "evaluations.jsonl", [_evaluation(step, loss, depths, predicted) for step in told])
    (run / "run.json").write_text(json.dumps({"starts": [{"step": 0}]}))
    if summary:
        last = metrics[-1]
        spent = {"total": last["flops_total"], "model": 0.9 * last["flops_total"]}
        (run / "summary.json").write_text(json.dumps({"step": end, "flops": spent, "layout": {"data": 2}}))
    return run


def _evaluation(step: int, loss: Callable[[float], float | None], depths: Sequence[str], predicted: int) -> dict[str, Any]:
    own = loss(step * STEP_TOKENS)
    losses = {
        depth: None if own is None else own + 0.1 * behind for behind, depth in zip(reversed(range(len(depths))), depths, strict=True)
    }
    record: dict[str, Any] = {"step": step, "tokens": step * STEP_TOKENS, "loss": losses, "predicted_tokens": predicted}
    if len(depths) > 1:
        record |= {"iterations": dict.fromkeys(depths[1:], 3.0), "proposal_distance": 0.4, "converged": 1.0}
    return record
