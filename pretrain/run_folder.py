"""The folder of a run: who may write there, and its plain files.

    config.yaml         the resolved recipe
    run.json            one entry a start: time, command line, commit, package versions, the step it began from
    metrics.jsonl       one object a logged step;  evaluations.jsonl  one an evaluation: the record of the run, each step once
    summary.json        the last of each and the totals
    tokenizer.json      that of the data, so that the run can be used without it
    imported.json       of a run that began with imported weights: where they came from
    checkpoints/        see pretrain.checkpoint_files

A folder that holds a run is refused unless that run is resumed, and a second process that would write there at the same time is
refused too (a POSIX lock, which the system drops when its process dies). Only rank 0 writes; on other ranks the methods do nothing.
JSON is strict: a number that is not finite is written as null, since JSON has no NaN and a string would break every reader of numbers.
Importing this file imports no torch, so that the command line can refuse before any process starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pretrain import durable
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped

CONFIG, STARTS, METRICS, EVALUATIONS, SUMMARY, CHECKPOINTS = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "checkpoints",
)
PACKAGES = ("attractor", "torch", "deepspeed", "megatron-core", "mosaicml-streaming", "tokenizers", "numpy")
TOKENIZER = "tokenizer.json"
IMPORTED = "imported.json"
_GLOB = "*?["

logger = logging.getLogger(__name__)


def guard(path: Path, *, resume: bool) -> None:
    """Refuses a folder this run may not have: one that holds another run, or, to resume, one that holds none. Touches nothing."""
    if any(sign in str(path.resolve()) for sign in _GLOB):
        raise Refusal(
            f"The run folder {path.resolve()} has one of the characters {' '.join(_GLOB)} in its path, which DeepSpeed reads as a pattern "
            f"when it looks for checkpoint files. Choose another run.dir."
        )
    if path.exists() and not path.is_dir():
        raise Refusal(f"The run folder {path} is a file. Choose another run.dir.")
    holds = [name for name in (CONFIG, STARTS, METRICS, EVALUATIONS, CHECKPOINTS) if (path / name).exists()]
    if holds and not resume:
        raise Refusal(
            f"The run folder {path} already holds a run ({', '.join(holds)}). Add --resume to continue that run, or give this one another "
            f"folder with run.dir=..."
        )
    if resume and not holds:
        raise Refusal(f"There is no run to resume in {path}. Check run.dir, or leave out --resume to start a new run there.")


class RunFolder:
    """A run's folder, held by this process from `open` to `close`."""

    def __init__(self, path: Path, writes: bool, lock: TextIO | None) -> None:
        self.path = path
        self.writes = writes
        self.metrics = Records(path / METRICS, writes)
        self.evaluations = Records(path / EVALUATIONS, writes)
        self._lock = lock

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> RunFolder:
        """Guards, creates and locks the folder. Every rank calls it; rank 0 looks and all raise the same Refusal."""
        from pretrain.agreement import gather, rank

        fault, lock = "", None
        if rank() == 0:
            try:
                guard(path, resume=resume)
                path.mkdir(parents=True, exist_ok=True)
                lock = _lock(path)
            except Refusal as error:
                fault = str(error)
            except OSError as error:
                fault = f"The run folder {path} cannot be used: {error.strerror}. Choose another run.dir or mend its permissions."
        if fault := gather(fault)[0]:
            raise Refusal(fault)
        return cls(path, rank() == 0, lock)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / CHECKPOINTS

    def begin(self, config: str, command: Sequence[str], *, step: int = 0, tokenizer: str | None = None, notes: Sequence[str] = ()) -> None:
        """Writes config.yaml and tokenizer.json, adds this start to run.json with what is to be noted of it (another checkpoint than the
        newest, another layout), and drops every record after `step`, the step resumed from (0: all).

        Called on every rank once it is certain that the run goes on: after the checkpoint is loaded, before the first record. Raises
        RunStopped (code 5) on all of them when the disk refuses.
        """
        from pretrain.agreement import gather

        fault = ""
        try:
            if self.writes:
                self._begin(config, _this_start(command, step, notes), step, tokenizer)
        except OSError as error:
            fault = str(error.strerror)
        if said := next((text for text in gather(fault) if text), ""):
            raise RunStopped(
                f"The run folder {self.path} could not be written: {said}. No step was trained; checkpoints are untouched. Make room on "
                f"that disk, then start again (with --resume if the folder holds a run).",
                BAD_CHECKPOINT_WRITE,
            )

    def _begin(self, config: str, start: Mapping[str, Any], step: int, tokenizer: str | None) -> None:
        starts = self.path / STARTS
        before = json.loads(starts.read_text())["starts"] if starts.exists() else []
        durable.write_atomically(self.path / CONFIG, config)
        if tokenizer is not None:
            durable.write_atomically(self.path / TOKENIZER, tokenizer)
        durable.write_atomically(starts, dump({"starts": [*before, start]}, indent=1) + "\n")
        for records in (self.metrics, self.evaluations):
            records.truncate_after(step)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces summary.json, whole or not at all. A disk that refuses is logged: it says nothing that the record does not."""
        if not self.writes:
            return
        try:
            durable.write_atomically(self.path / SUMMARY, dump(summary, indent=1) + "\n")
        except OSError as error:  # often a run is ending because of this very disk: its own reason must come through
            logger.warning("%s could not be written: %s", self.path / SUMMARY, error.strerror)

    def close(self) -> None:
        """Ends the hold on the folder."""
        self.metrics.close()
        self.evaluations.close()
        if self._lock is not None:
            self._lock.close()


class Records:
    """A JSON Lines file, appended one object at a time, each flushed at once. Each object has a `step`."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self._writes = writes
        self._file: TextIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line. Raises RunStopped (code 5) when the disk refuses: without its record the run is worth little."""
        if not self._writes:
            return
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(dump(record) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is still in the buffer is refused once more, and the file closed all the same
                self.close()
            self._file = None
            raise RunStopped(
                f"The record {self.path} could not be written: {error.strerror}. The last checkpoint is untouched. Make room on that disk, "
                f"then go on with --resume, which takes the record back to that checkpoint.",
                BAD_CHECKPOINT_WRITE,
            ) from error

    def last(self) -> dict[str, Any] | None:
        """The newest object there, or None."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return json.loads(lines[-1]) if lines else None

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, and lines a kill left unfinished (these are counted and logged). The file changes at once."""
        if not self._writes or not self.path.exists():
            return
        self.close()
        kept, broken = [], 0
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                broken += 1
        if broken:
            logger.warning("%s: %d unreadable line(s) dropped (a run that was killed leaves its last one unfinished)", self.path, broken)
        durable.write_atomically(self.path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Closes the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def dump(value: Any, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become null. Raises TypeError for what JSON has no word for."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _lock(path: Path) -> TextIO | None:
    """Holds PATH/.lock until closed. A POSIX lock: forked workers do not inherit it, so it ends with the process that took it."""
    file = (path / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise Refusal(f"Another process is writing to the run folder {path}. Wait until it ends, or choose another run.dir.") from error
    except OSError as error:
        file.close()
        logger.warning("%s has no file locks (%s): take care that only one process writes there", path, error.strerror)
        return None
    return file


def _this_start(command: Sequence[str], step: int, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "step": step,
        "notes": list(notes),
        "commit": _commit(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the source, with `+changes` when files differ from it; None when it is not in a git checkout."""
    git = ["git", "-C", os.fspath(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes.strip() else "")
