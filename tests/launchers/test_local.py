"""Local ranks, with small stand-in scripts: what they are told, how they end together, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.local import Place, free_port, launch, rank_environment

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Writes a stand-in for pretrain/train.py: `rank`, `folder`, os, sys, time and signal are there."""

    def write(body: str) -> str:
        file = tmp_path / "rank.py"
        head = f"import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\nfolder = {str(tmp_path)!r}\n"
        note = "open(f'{folder}/pid{rank}.tmp', 'w').write(str(os.getpid()))\nos.rename(f'{folder}/pid{rank}.tmp', f'{folder}/pid{rank}')\n"
        file.write_text(head + note + body)
        return str(file)

    return write


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder: Path, ranks: int) -> list[int]:
    """Process ids of the ranks, once all have started."""
    wait_for(lambda: all((folder / f"pid{rank}").exists() for rank in range(ranks)), "the ranks to start")
    return [int((folder / f"pid{rank}").read_text()) for rank in range(ranks)]


def launcher(file: str, ranks: int) -> subprocess.Popen[bytes]:
    """`launch` in a process of its own, to send signals to."""
    code = f"import sys; from launchers.local import launch; sys.exit(launch([{file!r}], {ranks}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)


def test_every_rank_knows_its_place(script: Callable[[str], str], tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    file = script(f"json.dump({{name: os.environ[name] for name in {names!r}}}, open(f'{{folder}}/env{{rank}}', 'w'))")
    assert launch([file], 3) == 0
    told = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(3)]
    assert [one["RANK"] for one in told] == [one["LOCAL_RANK"] for one in told] == ["0", "1", "2"]
    assert {one["WORLD_SIZE"] for one in told} == {one["LOCAL_WORLD_SIZE"] for one in told} == {"3"}
    assert len({one["MASTER_PORT"] for one in told}) == 1


def test_machines_started_apart_make_one_run(script: Callable[[str], str], tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    file = script(f"json.dump([os.environ[name] for name in {names!r}], open(f'{{folder}}/env{{rank}}', 'w'))")
    port = free_port()
    for node in range(2):
        assert launch([file], 2, Place(node, 2, "node-0", port)) == 0
    told = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(4)]
    assert told == [[str(rank), str(rank % 2), "4", "2", "node-0", str(port)] for rank in range(4)]


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert rank_environment(0, 4, 1)["OMP_NUM_THREADS"] == "4"
    assert rank_environment(0, 32, 1)["OMP_NUM_THREADS"] == "1"


def test_the_first_to_fail_decides_and_the_others_end(script: Callable[[str], str], tmp_path: Path) -> None:
    file = script("""
while not all(os.path.exists(f"{folder}/pid{r}") for r in range(3)): time.sleep(.01)
if rank == 1: sys.exit(7)
time.sleep(600)
""")
    assert launch([file], 3) == 7
    assert not any(alive(pid) for pid in started(tmp_path, 3))


def test_a_rank_that_ignores_sigterm_is_killed(script: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.local._GRACE", 0.3)
    file = script("""
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"{folder}/ready", "w")
    time.sleep(600)
while not os.path.exists(f"{folder}/ready"): time.sleep(.01)
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert launch([file], 2) == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in started(tmp_path, 2))


def test_loader_processes_of_a_rank_end_with_it(script: Callable[[str], str], tmp_path: Path) -> None:
    file = script("""
if rank == 0:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    open(f"{folder}/child.tmp", "w").write(str(child))
    os.rename(f"{folder}/child.tmp", f"{folder}/child")
while not os.path.exists(f"{folder}/child"): time.sleep(.01)
sys.exit(4 if rank else 0)
""")
    assert launch([file], 2) == 4
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not alive(child), "the child to end")


def test_ranks_that_stop_on_purpose_let_the_others_finish_writing(script: Callable[[str], str], tmp_path: Path) -> None:
    file = script("""
if rank == 0:
    time.sleep(1)
    open(f"{folder}/checkpoint", "w").write("whole")
sys.exit(3)
""")
    assert launch([file], 2) == 3
    assert (tmp_path / "checkpoint").read_text() == "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank(script: Callable[[str], str], tmp_path: Path, number: signal.Signals) -> None:
    file = script("""
def save(number, frame):
    open(f"{folder}/saved{rank}", "w").write(str(number))
    sys.exit(3)
for one in (signal.SIGTERM, signal.SIGUSR1): signal.signal(one, save)
open(f"{folder}/ready{rank}", "w")
time.sleep(600)
""")
    process = launcher(file, 2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)), "the ranks to listen")
    process.send_signal(number)
    assert process.wait(PATIENCE) == 3
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_ctrl_c_ends_all_quietly(script: Callable[[str], str], tmp_path: Path) -> None:
    file = script("""
try:
    open(f"{folder}/ready{rank}", "w")
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(130)
""")
    process = launcher(file, 2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)), "the ranks to listen")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert not any(alive(pid) for pid in started(tmp_path, 2))


def test_ranks_do_not_outlive_a_killed_launcher(script: Callable[[str], str], tmp_path: Path) -> None:
    process = launcher(script("time.sleep(600)"), 2)
    pids = started(tmp_path, 2)
    process.kill()
    process.wait(PATIENCE)
    wait_for(lambda: not any(alive(pid) for pid in pids), "orphans to end")
