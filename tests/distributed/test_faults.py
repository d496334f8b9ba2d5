"""A run of two real ranks, one of which fails in silence: it hangs, or a bit flips. The job ends, says so, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import HUNG, VIOLATED
from tests.distributed.faulty_rank import FAULT_AT
from tests.distributed.ranks import ROOT
from tests.pretrain.tiny_run import SETTINGS, prepare_text

pytestmark = pytest.mark.timeout(600)  # real ranks, and a machine may be slow
START = "import sys; from launchers.local import launch; sys.exit(launch(sys.argv[1:], 2))"


def run(kind: str, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    data = prepare_text(folder / "data")
    words = ["-m", "tests.distributed.faulty_rank", kind, "demo", f"data.path={data}", f"run.dir={folder / 'run'}", *SETTINGS, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", START, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still train there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if f"run.dir={folder / 'run'}" in line:
            found.append(line)
    return found


def test_a_hung_rank_ends_the_job_and_every_rank_shows_where_it_stands(tmp_path: Path) -> None:
    done = run("hang", tmp_path, "train.hang_timeout=20")
    assert done.returncode == HUNG, done.stderr[-3000:]
    assert "rank 1 on " in done.stderr
    assert f"It last reported step {FAULT_AT - 1}" in done.stderr
    assert "faulty_rank.py" in done.stderr, "the stack of the rank that sleeps"
    assert not left_over(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == FAULT_AT - 1


def test_a_flipped_bit_ends_the_run_and_names_tensor_and_rank(tmp_path: Path) -> None:
    """ZeRO 1 would gather the damaged rank's weights anew from the optimizer's halves: the damage is in what stays, so ZeRO 0."""
    done = run("flip", tmp_path, f"train.check_every={FAULT_AT + 1}", "layout.zero=0", "train.precision=fp32")
    assert done.returncode == VIOLATED, done.stderr[-3000:]
    assert "norm.weight" in done.stderr
    assert "rank 1" in done.stderr
    assert not left_over(tmp_path)
