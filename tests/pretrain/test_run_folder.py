"""The run folder: one run in it, one writer, each step once in its record, strict JSON, whole files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import durable
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.run_folder import Records, RunFolder, guard
from tests.distributed.ranks import ROOT


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def started(path: Path) -> RunFolder:
    folder = RunFolder.open(path, resume=False)
    folder.begin("train: {}\n", ["attractor", "train", "demo"])
    return folder


def test_a_folder_that_holds_a_run_is_refused_and_untouched(tmp_path: Path) -> None:
    started(tmp_path / "run").close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(Refusal, match=r"already holds a run \(config.yaml, run.json\).*--resume"):
        RunFolder.open(tmp_path / "run", resume=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    RunFolder.open(tmp_path / "run", resume=True).close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_any_trace_of_a_run_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(Refusal, match="already holds a run"):
        guard(tmp_path, resume=False)


def test_other_folders_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, resume, said in (
        (tmp_path / "empty", True, "no run to resume"),
        (tmp_path / "file", False, "is a file"),
        (tmp_path / "lr[1]", False, "reads as a pattern"),
        (tmp_path / "file" / "below", False, "cannot be used"),
    ):
        with pytest.raises(Refusal, match=said):
            RunFolder.open(path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    folder = started(tmp_path)
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["command"] == ["attractor", "train", "demo"]
    assert start["step"] == 0
    assert "torch" in start["packages"]
    assert (tmp_path / "config.yaml").read_text() == "train: {}\n"
    assert folder.checkpoints == tmp_path / "checkpoints"


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    started(tmp_path).close()
    program = "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ninput()"
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Refusal, match="Another process is writing"):
            RunFolder.open(tmp_path, resume=True)
        other.kill()
    RunFolder.open(tmp_path, resume=True).close()


def test_a_lock_of_ours_is_seen_by_others(tmp_path: Path) -> None:
    folder = started(tmp_path)
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    assert subprocess.run(other, capture_output=True, check=False).returncode != 0
    folder.close()
    assert subprocess.run(other, capture_output=True, check=False).returncode == 0


def test_resuming_leaves_each_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = started(tmp_path)
    for step in (10, 20, 30):
        folder.metrics.append({"step": step, "loss": 1.0})
    folder.evaluations.append({"step": 30, "loss": {"0": 1.0}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    folder.close()

    folder = RunFolder.open(tmp_path, resume=True)
    folder.begin("train: {seed: 0}\n", ["attractor", "train", "demo", "--resume"], step=20, notes=["another layout"])
    assert "1 unreadable line(s) dropped" in caplog.text
    for step in (30, 40):
        folder.metrics.append({"step": step, "loss": 2.0})
    folder.close()
    assert [(record["step"], record["loss"]) for record in read(tmp_path / "metrics.jsonl")] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    assert read(tmp_path / "evaluations.jsonl") == []
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [(start["step"], start["notes"]) for start in starts] == [(0, []), (20, ["another layout"])]
    assert (tmp_path / "config.yaml").read_text() == "train: {seed: 0}\n"


def test_truncation_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "metrics.jsonl", writes=True)
    for step in (1, 2):
        records.append({"step": step})
    before = records.path.read_bytes()

    def full(path: Path, writer: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(OSError, match="No space"):
        records.truncate_after(1)
    assert records.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_record_is_on_the_disk_at_once_and_strict(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl", writes=True)
    records.append({"step": 1, "loss": float("nan"), "by": {"0": float("inf"), "1": [2.5, float("-inf")]}})
    assert read(records.path) == [{"step": 1, "loss": None, "by": {"0": None, "1": [2.5, None]}}]
    with pytest.raises(TypeError):
        records.append({"step": object()})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_record_that_cannot_be_written_stops_the_run() -> None:
    records = Records(Path("/dev/full"), writes=True)
    with pytest.raises(RunStopped, match="No space left on device") as stopped:
        records.append({"step": 1})
    assert stopped.value.code == BAD_CHECKPOINT_WRITE
    records.close()  # at the run's end: what could not be written must not be tried, and refused, again


def test_a_start_that_cannot_be_written_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, writer: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder.open(tmp_path / "run", resume=False)
    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(RunStopped, match=r"No space left on device\. No step was trained") as stopped:
        folder.begin("train: {}\n", [])
    assert stopped.value.code == BAD_CHECKPOINT_WRITE


def test_the_last_record(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl", writes=True)
    assert records.last() is None
    for step in (1, 2):
        records.append({"step": step})
    assert records.last() == {"step": 2}


def test_summary_is_replaced_whole(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.write_summary({"loss": 2.0, "tokens": 10})
    folder.write_summary({"loss": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None}


def test_a_summary_that_cannot_be_written_hides_no_other_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = started(tmp_path)
    folder.write_summary({"loss": 2.0})

    def full(path: Path, writer: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    folder.write_summary({"loss": 3.0})
    assert "No space left on device" in caplog.text
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 2.0}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=False, lock=None)
    folder.begin("", [])
    folder.metrics.append({"step": 1})
    folder.write_summary({})
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_guarding_needs_no_torch() -> None:
    program = "import sys, pretrain.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
