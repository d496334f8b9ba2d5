"""Ranks that are forked are as new processes are, and end as they do: what every test on several ranks stands on."""

from __future__ import annotations

import atexit
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launchers.local import free_port
from tests.distributed.ranks import rank_environment, run_ranks, start


def facts() -> dict[str, Any]:
    """What a rank could have inherited."""
    return {
        "rank": os.environ["RANK"],
        "word": os.environ.get("WORD"),
        "hash": hash("word"),
        "drawn": [random.random(), np.random.random(), float(torch.rand((), dtype=torch.float64))],
        "threads": threading.active_count(),
        "standard input": os.read(0, 1).decode(),
    }


def leave_a_word(path: str) -> None:
    """And fail."""
    atexit.register(Path(path).write_text, "shut down")
    raise ValueError("a fault of its own")


def hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_rank_begins_as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORD", raising=False)
    before = run_ranks("tests.distributed.test_ranks:facts", 2)
    monkeypatch.setenv("WORD", "set after the servers were started")
    after = run_ranks("tests.distributed.test_ranks:facts", 2)
    ranks = before + after
    assert [told["rank"] for told in ranks] == ["0", "1"] * 2
    assert [told["word"] for told in ranks] == [None] * 2 + ["set after the servers were started"] * 2
    assert before[0]["hash"] != before[1]["hash"], "sets have another order on the other rank"
    assert len({number for told in ranks for number in told["drawn"]}) == 3 * 4, "what is not seeded differs by rank"
    assert {(told["threads"], told["standard input"]) for told in ranks} == {(1, "")}


def test_a_rank_that_fails_is_told_and_shuts_the_interpreter_down(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)on 1 ranks failed \(codes \[1\]\).*ValueError: a fault of its own"):
        run_ranks("tests.distributed.test_ranks:leave_a_word", 1, str(tmp_path / "word"))
    assert (tmp_path / "word").read_text() == "shut down"


def test_a_rank_that_hangs_is_gone_when_nobody_waits_for_it(tmp_path: Path) -> None:
    told = tmp_path / "process"
    words = ["tests.distributed.test_ranks:hang", f'["{told}"]', str(tmp_path / "result")]
    rank = start(0, words, rank_environment(0, 1, free_port()), tmp_path / "log")
    deadline = time.monotonic() + 240
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert rank.code(0.01) is None
    rank.end()
    assert rank.code(0) == -9
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
