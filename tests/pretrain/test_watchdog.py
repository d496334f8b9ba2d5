"""The watchdog on real processes that hang in every way: what they say, how they end, what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import HUNG

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "sleeps": """
def stuck_here():
    time.sleep(300)

with Watchdog(1.0, "rank 3") as watchdog:
    watchdog.beat("step 12")
    stuck_here()
""",
    "holds the lock": """
import ctypes

def locked_here():
    ctypes.PyDLL(None).sleep(300)

with Watchdog(1.0, "rank 3") as watchdog:
    watchdog.beat("step 12")
    locked_here()
""",
    "has a child": """
import multiprocessing

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
    child.start()
    print(child.pid, flush=True)
    with Watchdog(1.0, "rank 3") as watchdog:
        time.sleep(300)
""",
    "nobody reads": """
import os

os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"." * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
with Watchdog(1.0, "rank 3") as watchdog:
    time.sleep(300)
""",
    "beats": """
with Watchdog(3.0, "rank 3") as watchdog:
    for step in range(140):
        watchdog.beat(f"step {step}")
        time.sleep(0.05)
time.sleep(5)
""",
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them, started together."""
    head = "import time\nfrom pretrain.watchdog import Watchdog\n"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, "-c", head + script], cwd=ROOT, start_new_session=True, **pipes)
        for name, script in SCRIPTS.items()
    }
    yield started
    for process in started.values():
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hang_is_named_shown_and_ended(processes: dict[str, subprocess.Popen[str]]) -> None:
    _, said = processes["sleeps"].communicate(timeout=60)
    assert processes["sleeps"].returncode == HUNG
    paragraph, _, stacks = said.partition("\n")
    assert paragraph.startswith(f"error: rank 3 on {socket.gethostname()} has made no progress for 1 s")
    assert "It last reported step 12" in paragraph
    assert "train.hang_timeout (now 1 s)" in paragraph
    assert "in stuck_here" in stacks
    assert "in _watch" in stacks, "all threads"


def test_a_hang_that_holds_the_interpreters_lock_is_shown_and_ended(processes: dict[str, subprocess.Popen[str]]) -> None:
    _, said = processes["holds the lock"].communicate(timeout=60)
    assert processes["holds the lock"].returncode == 1
    assert "in locked_here" in said


def test_children_end_too(processes: dict[str, subprocess.Popen[str]]) -> None:
    child, said = processes["has a child"].communicate(timeout=60)
    assert processes["has a child"].returncode == HUNG
    assert "It last reported starting" in said
    deadline = time.monotonic() + 30
    while alive(int(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(child))


def test_it_ends_though_nobody_reads_what_it_says(processes: dict[str, subprocess.Popen[str]]) -> None:
    assert processes["nobody reads"].wait(timeout=60) == HUNG
    processes["nobody reads"].communicate()


def test_one_that_beats_is_left_alone_and_so_is_what_comes_after(processes: dict[str, subprocess.Popen[str]]) -> None:
    out, said = processes["beats"].communicate(timeout=60)
    assert (processes["beats"].returncode, out, said) == (0, "", "")
