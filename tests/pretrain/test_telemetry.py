"""Telemetry: the record always, mirrors when they can, and never at the cost of the run. Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pretrain import telemetry
from pretrain.progress import Progress, clock, short
from pretrain.run_folder import RunFolder
from pretrain.telemetry import Telemetry, bounded
from tests.distributed.ranks import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder.open(tmp_path / "run", resume=False)
    yield folder
    folder.close()


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class _Mirror:
    """Remembers what it is shown; fails at the step given."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at = fail_at
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("the server went away")
        self.seen.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


def test_the_record_and_a_mirror(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = _Mirror()
    monkeypatch.setattr(telemetry, "TensorBoardMirror", lambda path, step: mirror)
    run = Telemetry(folder, tensorboard=True)
    run.log({"step": 1, "loss": 2.0, "note": "text", "memory_bytes": None, "flag": True})
    run.evaluation({"step": 1, "tokens": 7, "loss": {"0": 3.0, "auto": 2.5}})
    run.close()
    assert steps_of(folder.path / "metrics.jsonl") == steps_of(folder.path / "evaluations.jsonl") == [1]
    assert mirror.seen == [
        (1, {"loss": 2.0}),
        (1, {"evaluation/tokens": 7, "evaluation/loss/0": 3.0, "evaluation/loss/auto": 2.5}),
    ]
    assert mirror.closed


def test_a_mirror_that_fails_is_switched_off_with_one_warning(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = _Mirror(fail_at=2)
    monkeypatch.setattr(telemetry, "TensorBoardMirror", lambda path, step: mirror)
    run = Telemetry(folder, tensorboard=True)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    run.close()
    assert steps_of(folder.path / "metrics.jsonl") == [1, 2, 3]
    assert [step for step, _ in mirror.seen] == [1]
    assert len(caplog.records) == 1
    assert "TensorBoard is switched off, it failed: ConnectionError: the server went away" in caplog.text


def test_a_mirror_that_does_not_answer_is_left_behind(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    monkeypatch.setattr(telemetry, "TensorBoardMirror", lambda path, step: never.wait())
    run = Telemetry(folder, tensorboard=True, start_seconds=0.05)
    run.log({"step": 1})
    run.close()
    never.set()
    assert steps_of(folder.path / "metrics.jsonl") == [1]
    assert len(caplog.records) == 1
    assert "TensorBoard is switched off, it could not start: TimeoutError: no answer within 0.05 s. Training goes on" in caplog.text


def test_bounded_hands_over_results_and_errors() -> None:
    assert bounded(lambda: 5, 5, "five") == 5
    with pytest.raises(RuntimeError, match="ValueError: wrong"):
        bounded(lambda: _raise(ValueError("wrong")), 5, "wrong")


def _raise(error: Exception) -> None:
    raise error


def test_tensorboard_shows_the_numbers_and_hides_undone_steps(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Telemetry(folder, tensorboard=True)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    run.close()
    run = Telemetry(folder, tensorboard=True, step=2)
    for step in (3, 4):
        run.log({"step": step, "loss": 2.0})
    run.close()
    shown = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


WANDB = """
import json, pathlib, sys
from pretrain.run_folder import RunFolder
from pretrain.telemetry import Telemetry
mode, path, starts = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
state = {}
for start in range(starts):
    folder = RunFolder.open(path, resume=start > 0)
    folder.begin("", [])
    run = Telemetry(folder, wandb=mode, project="p", config={"a": 1}, state=state, start_seconds=4)
    for step in (1, 2):
        run.log({"step": step, "loss": 1.0 / step})
    run.close()
    folder.close()
    state = run.state_dict()
    print(state["wandb_id"])
"""


def run_wandb(mode: str, path: Path, starts: int, **environment: str) -> tuple[list[str], str]:
    """A process that starts the run so often, two steps each: wandb's run id of each start, and its standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, mode, path, str(starts)],
        cwd=ROOT,
        env={**clean, "HOME": str(path.parent), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(path / "metrics.jsonl") == [1, 2]
    return done.stdout.splitlines(), done.stderr


def test_wandb_offline_is_silent_and_keeps_its_id(tmp_path: Path) -> None:
    ids, said = run_wandb("offline", tmp_path / "run", 2)
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert said == f"wandb: offline runs cannot be continued; `wandb sync --append` joins this one to run {ids[0]}\n"
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{ids[0]}"))


@pytest.mark.parametrize("environment", [{"WANDB_API_KEY": "a" * 40}, {}])
def test_wandb_without_a_server_costs_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    (identity,), said = run_wandb("online", tmp_path / "run", 1, WANDB_BASE_URL="http://127.0.0.1:9", **environment)
    assert len(identity) == 8
    assert said.count("\n") == 1, said
    assert "wandb is switched off, it could not start" in said


def test_other_ranks_record_and_mirror_nothing(tmp_path: Path) -> None:
    run = Telemetry(RunFolder(tmp_path, writes=False, lock=None), tensorboard=True, wandb="offline")
    run.log({"step": 1})
    run.close()
    assert list(tmp_path.iterdir()) == []


# --- progress

RECORD = {"step": 20, "tokens": 250_000, "loss": 3.14159, "tokens_per_second": 5000.0, "solver_iterations": 4.25}


def test_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(1_000_000, stream=stream)
    progress.update(RECORD)
    progress.update({"step": 30, "tokens": 1_000_000, "loss": None})
    progress.note("saved")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 20  250k/1M tokens  loss 3.1416  iterations 4.25  5k tokens/s  left 2m 30s",
        "step 30  1M/1M tokens  5k tokens/s  left 0m 00s",
        "saved",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(1_000_000, tokens=100_000, stream=stream)
    progress.update(RECORD)
    progress.note("saved [bold]")
    progress.close()
    assert "loss 3.1416" in stream.getvalue()
    assert "saved [bold]" in stream.getvalue()


def test_other_ranks_show_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(10, enabled=False, stream=stream)
    progress.update(RECORD)
    progress.note("x")
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (950, "950"), (12_345, "12.3k"), (4_560_000, "4.56M"), (2e9, "2B")])
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0m 00s"), (-3, "0m 00s"), (59.6, "1m 00s"), (3661, "1h 01m"), (200_000, "2d 07h")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
