"""A run from its recipe to its summary: data, engine, resume, the loop, what is written on the way.

Every rank runs this. The order is: refuse what can be refused, take the folder, resume, then per step: schedule, train_step,
ledger, record, evaluate, save. A run ends by its budget, by a signal (saved, exit code 3), by too many non-finite steps (4), by a
disk that refuses (5), by ranks that no longer train one model (6) or by a rank that makes no progress (7).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pretrain.config import AnyRecipe, PuzzleRecipe
from pretrain.errors import NON_FINITE, SIGNALLED, RunStopped
from pretrain.layout import as_dict, layout_on
from pretrain.mesh import Mesh, connect
from pretrain.regime import Regime, Stepped
from pretrain.runtime import process_group
from pretrain.watchdog import Watchdog


def train(recipe: AnyRecipe, resume: bool) -> None:
    """Trains the recipe as this process's rank. Raises Refusal and RunStopped."""
    run_data = _module(recipe, "run_data")
    recipe = run_data.resolve(recipe)
    with process_group(recipe.train) as device:  # before anything that imports deepspeed
        from pretrain.agreement import rank, world_size
        from pretrain.run_folder import RunFolder
        from pretrain.startup import agree_on_start

        with Watchdog(recipe.train.hang_timeout, f"rank {rank()}") as watchdog:
            agree_on_start(recipe.to_yaml())
            layout = layout_on(recipe.layout, world_size())
            accumulation = recipe.check_world(layout.data)
            mesh = connect(layout, device)
            data = run_data.open_data(recipe, mesh)  # what does not fit is refused before the folder is touched
            watchdog.beat("data opened")
            folder = RunFolder.open(Path(recipe.run.dir), resume=resume)
            try:
                regime = _module(recipe, "regime").open_regime(recipe, device, mesh, accumulation, data)
                watchdog.beat("engine built")
                _Run(recipe, regime, folder, device, mesh, resume, watchdog).train()
            finally:
                folder.close()


def _module(recipe: AnyRecipe, name: str) -> Any:
    """The recipe's regime's own `run_data` (resolve, open_data) or `regime` (open_regime); the latter imports deepspeed."""
    if isinstance(recipe, PuzzleRecipe):
        return import_module(f"pretrain.reasoning.{name}")
    return import_module({"run_data": "pretrain.run_data", "regime": "pretrain.language"}[name])


class _Run:
    """The parts of a running run. `train` is the loop; the rest is what it does at each turn."""

    def __init__(
        self, recipe: AnyRecipe, regime: Regime, folder: Any, device: torch.device, mesh: Mesh, resume: bool, watchdog: Watchdog
    ) -> None:
        from pretrain.agreement import rank, world_size
        from pretrain.ledger import peak_flops
        from pretrain.progress import Progress
        from pretrain.telemetry import Telemetry

        self.recipe, self.regime, self.folder, self.device, self.mesh = recipe, regime, folder, device, mesh
        self.watchdog, self.engine, self.ledger = watchdog, regime.engine, regime.ledger
        self.step_tokens, self.total_steps = regime.step_tokens, regime.total_steps
        self.total_tokens = self.total_steps * self.step_tokens
        torch.manual_seed(recipe.train.seed * world_size() + rank())  # noise of penalties differs by rank; weights are made
        self.peak = recipe.train.peak_flops or self._known_peak(peak_flops)
        self.step, self.skipped, self.skipped_in_a_row, self.seconds = 0, 0, 0, 0.0
        self.since_record: list[float] = []  # seconds of each step
        self.notes: list[str] = []  # of what was resumed
        state = self._resume() if resume else None
        watchdog.beat("checkpoint loaded")
        self.first_step = self.step
        folder.begin(recipe.to_yaml(), sys.argv, step=self.step, tokenizer=regime.tokenizer(), notes=self.notes)
        self.last_record, self.last_evaluation = folder.metrics.last(), folder.evaluations.last()
        self.telemetry = Telemetry(
            folder,
            tensorboard=recipe.telemetry.tensorboard,
            wandb=recipe.telemetry.wandb,
            project=recipe.telemetry.project,
            name=recipe.run.name,
            config=recipe.model_dump(mode="json"),
            state=state,
            step=self.step,
        )
        self.progress = Progress(self.total_tokens, tokens=self.tokens, enabled=rank() == 0)

    @property
    def tokens(self) -> int:
        return self.step * self.step_tokens

    def _known_peak(self, lookup: Any) -> float | None:
        if self.device.type != "cuda":
            return None
        return lookup(torch.cuda.get_device_name(self.device), self.recipe.train.precision)

    def _resume(self) -> Mapping[str, Any]:
        """Takes the newest whole checkpoint; the telemetry's state in it."""
        from pretrain.checkpoint import load_latest
        from pretrain.checkpoint_files import step_name
        from pretrain.zero_pieces import pieces_of

        config = self.recipe.model_dump(mode="json")
        resumed = load_latest(self.engine, self.folder.checkpoints, config=config, pieces=pieces_of(self.engine, self.mesh))
        if resumed is None:
            return {}
        state = resumed.state
        self.step = resumed.step
        if state.loader:  # an import has been trained on nothing yet
            self.ledger.load_state_dict(state.ledger)
            self.skipped, self.skipped_in_a_row = state.counters["skipped"], state.counters["skipped_in_a_row"]
            self.seconds = state.counters["seconds"]
        self.notes = resumed.notes + self.regime.resume(resumed, self.folder.checkpoints / step_name(resumed.step))
        return state.telemetry

    def train(self) -> None:
        from pretrain.signals import StopRequest

        if self.step == self.total_steps:
            self.progress.note(f"All {self.total_steps} steps of the run in {self.folder.path} are done: nothing is left to train.")
        try:
            with StopRequest() as stop:
                while self.step < self.total_steps:
                    stopped = self._one_step(stop.requested)
                    last = self.step == self.total_steps
                    if last or self.step % self.recipe.evaluation.every == 0:
                        self._evaluate()
                    if last or stopped or self.step % self.recipe.checkpoint.every == 0:
                        self._save()
                    if stopped and not last:
                        raise RunStopped(
                            f"Stopped by a signal after step {self.step} of {self.total_steps}, and saved. Go on with --resume.", SIGNALLED
                        )
        finally:
            self.progress.close()
            self._write_summary()
            self.telemetry.close()

    def _one_step(self, stop_requested: bool) -> bool:
        """One step of training, entered in the ledger and, at its turn, in the record; whether a rank was asked to stop."""
        from pretrain.engine import model_of
        from pretrain.invariants import check, due
        from pretrain.optimizer import apply_schedule
        from pretrain.zero import client_optimizer

        recipe, started = self.recipe, time.perf_counter()
        scale = apply_schedule(client_optimizer(self.engine), self.tokens, self.regime.schedule, self.total_tokens)
        result = self.regime.step(number=self.step, stop_requested=stop_requested, beat=self.watchdog.beat)
        self.step += 1
        self.watchdog.beat(f"step {self.step}")
        self.since_record.append(time.perf_counter() - started)  # the step has read its numbers back, so the device is done
        self.seconds += self.since_record[-1]
        spent = self.ledger.step(self.step_tokens, result.work)
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.skipped += not result.applied
        if self.step % recipe.train.log_every == 0 or self.step == self.total_steps or not result.applied:
            self._record(result, spent, sum(self.since_record) / len(self.since_record), scale)
            self.since_record.clear()
        self._stop_if_diverged()
        if due(self.step, recipe.train.check_every, self.first_step):
            check(model_of(self.engine).named_parameters(), self.mesh, {"solver iterations": result.own_iterations})
        return result.stop

    def _stop_if_diverged(self) -> None:
        if self.skipped_in_a_row >= self.recipe.train.nonfinite_limit:
            raise RunStopped(
                f"The gradients were not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}; these steps changed "
                f"nothing, but training has diverged. Start another run (run.dir) with a lower {self.regime.rate_keys}; --resume "
                f"goes back to the last checkpoint of this one, as it was. train.nonfinite_limit sets how many such steps are borne.",
                NON_FINITE,
            )

    def _record(self, result: Stepped, spent: Any, step_seconds: float, scale: float) -> None:
        from pretrain.agreement import world_size

        model_rate = spent.model / step_seconds
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "lr": self.recipe.optimizer.lr * scale,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.step_tokens / step_seconds,
            "step_seconds": step_seconds,
            "mfu": model_rate / (self.peak * world_size()) if self.peak else None,
            "flops_step": spent.hardware,
            "flops_total": self.ledger.total.hardware,
            "flops_parts": asdict(spent),
            **result.measured,
            "memory_bytes": peak_memory(self.device),
            "skipped_steps": self.skipped,
        }
        self.last_record = record
        self.telemetry.log(record)
        self.progress.update(record)
        if not result.applied:
            self.progress.note(f"step {self.step}: gradients were not finite; the step was skipped ({self.skipped} so far)")

    def _evaluate(self) -> None:
        from pretrain.ema import averaged_weights

        self.engine.eval()
        try:
            if self.recipe.optimizer.ema is None:
                report = self.regime.evaluate(self.watchdog.beat)
            else:
                with averaged_weights(self.engine):
                    report = self.regime.evaluate(self.watchdog.beat)
        finally:
            self.engine.train()
        self.last_evaluation = {**report, "step": self.step, "tokens": self.tokens}
        self.telemetry.evaluation(self.last_evaluation)
        self.progress.note(f"validation at step {self.step}  {self.regime.in_words(report)}")

    def _save(self) -> None:
        from pretrain.checkpoint import save
        from pretrain.training_state import TrainingState
        from pretrain.weights import weight_files
        from pretrain.zero_pieces import pieces_of

        state = TrainingState(
            tokens=self.tokens,
            config=self.recipe.model_dump(mode="json"),
            ledger=self.ledger.state_dict(),
            loader=self.regime.position(),
            counters={"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "seconds": self.seconds},
            telemetry=self.telemetry.state_dict(),
            probe_loss=self.regime.probe(),
        )
        save(
            self.engine,
            self.folder.checkpoints,
            self.step,
            state,
            keep=self.recipe.checkpoint.keep,
            weights={**weight_files(self.engine, self.mesh), **self.regime.tensors()},
            pieces=pieces_of(self.engine, self.mesh),
        )

    def _write_summary(self) -> None:
        total = self.ledger.total
        self.folder.write_summary(
            {
                "name": self.recipe.run.name,
                "step": self.step,
                "total_steps": self.total_steps,
                "tokens": self.ledger.tokens,
                "seconds": self.seconds,
                "layout": as_dict(self.mesh.layout, zero=self.recipe.layout.zero),
                "flops": {"total": total.hardware, "model": total.model, **asdict(total)},
                "parameters": asdict(self.regime.parameters()),
                "skipped_steps": self.skipped,
                "metrics": self.last_record,
                "evaluation": self.last_evaluation,
            }
        )


def peak_memory(device: torch.device) -> int:
    """Bytes at the height so far: of the GPU's allocator, or of this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
