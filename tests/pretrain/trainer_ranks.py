"""Runs on each rank for test_trainer.py: whole runs of the trainer, one after the other in one process group, some of them disturbed."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch


def runs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of every case, in order.

    overrides    of the recipe `demo`
    resume       (false)
    broken       steps at which `broken_rank` (0) has a loss that is NaN
    full_at      the step whose checkpoint finds the disk full
    signalled    the step before which `signal_rank` (0) is asked to stop
    """
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    with (
        process_group(TrainSection(tokens=1, device="cpu")) as device,
        patch("pretrain.trainer.process_group", lambda settings: contextlib.nullcontext(device)),
    ):
        return [_one(case) for case in cases]


def _one(case: dict[str, Any]) -> dict[str, Any]:
    from pretrain.config import load_recipe
    from pretrain.errors import Refusal, RunStopped
    from pretrain.trainer import train

    recipe = load_recipe("demo", case["overrides"])
    said, terminal = io.StringIO(), sys.stdout
    steps: list[list[Any]] = []
    code, message = 0, ""
    with _disturbed(case, steps), patch.object(sys, "stdout", said):
        try:
            train(recipe, case.get("resume", False))
        except Refusal as refusal:
            code, message = 2, str(refusal)
        except RunStopped as stopped:
            code, message = stopped.code, str(stopped)
    print(said.getvalue(), file=terminal)
    return {"code": code, "message": message, "said": said.getvalue(), "steps": steps, "there": _names(Path(recipe.run.dir))}


def _names(run: Path) -> list[str] | None:
    return sorted(path.name for path in run.iterdir()) if run.exists() else None


@contextlib.contextmanager
def _disturbed(case: dict[str, Any], steps: list[list[Any]]) -> Iterator[None]:
    """Adds (loss, gradient norm, applied, stop, sample ids) of each step to `steps`, and does what the case asks for."""
    import pretrain.step
    from model.language_model import LanguageModel
    from pretrain import durable
    from pretrain.agreement import rank

    real_step, real_predict = pretrain.step.train_step, LanguageModel.predict
    broken = False

    def predict(self: LanguageModel, hidden: Any, targets: Any) -> Any:
        return real_predict(self, hidden, targets) * (math.nan if broken else 1.0)

    def train_step(engine: Any, batches: Any, accumulation: int, mesh: Any, **options: Any) -> Any:
        nonlocal broken
        ids: list[int] = []

        def noting() -> Any:
            for batch in batches:
                ids.extend(batch.sample_ids.tolist())
                yield batch

        step = engine.global_steps + 1
        broken = step in case.get("broken", []) and rank() == case.get("broken_rank", 0)
        if step == case.get("signalled") and rank() == case.get("signal_rank", 0):
            options["stop_requested"] = True
        result = real_step(engine, noting(), accumulation, mesh, **options)
        broken = False
        steps.append([result.loss, result.grad_norm, result.applied, result.stop, ids])
        return result

    real_write = durable.write

    def write(path: Path, writer: Any) -> None:
        if f"step-{case.get('full_at', 0):08d}.partial" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(path, writer)

    with (
        patch.object(pretrain.step, "train_step", train_step),
        patch.object(LanguageModel, "predict", predict),
        patch.object(durable, "write", write),
    ):
        yield
