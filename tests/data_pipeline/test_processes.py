"""Real processes: several on one host at once, kill -9 and restart, while reading and while preparing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import TokenLoader, verify
from data_pipeline.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


def start(module: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"tests.data_pipeline.{module}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("remote", [False, True])
def test_two_jobs_on_one_host_and_one_killed_and_restarted(small_set: Path, tmp_path: Path, remote: bool) -> None:
    """Both read one set (through one cache, if remote) at once; one dies by kill -9 inside an epoch and continues where its log ends."""
    loader = TokenLoader([(small_set, 1.0)], micro_batch=4, seed=3)
    expected = [next(loader).sample_ids.tolist() for _ in range(500)]
    cache = tmp_path / "cache" if remote else "-"
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    jobs = [start("reader_process", small_set, cache, 500, log, die_after) for log, die_after in zip(logs, (123, 0), strict=True)]
    try:
        wait_until(lambda: all(log.with_suffix(".ready").exists() for log in logs))
        (tmp_path / "go").touch()
        assert [job.wait(timeout=60) for job in jobs] == [-9, 0]
        assert len(logs[0].read_text().splitlines()) == 123
        jobs.append(start("reader_process", small_set, cache, 500, logs[0], 0))
        assert jobs[-1].wait(timeout=60) == 0
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    for log in logs:
        assert [json.loads(line)["samples"] for line in log.read_text().splitlines()] == expected
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_preparation_leaves_nothing_that_looks_finished_and_no_worker(tmp_path: Path) -> None:
    source, tokenizer, out, pids = (tmp_path / name for name in ("corpus.jsonl", "tokenizer.json", "set", "pids"))
    texts = [f"Document {number} says: the quick brown fox.\n" * 5 for number in range(600)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(iter(texts[:100]), 300).save(str(tokenizer))
    assert start("prepare_process", source, tokenizer, out, pids).wait(timeout=60) == -9
    assert not out.exists()
    assert len(list(tmp_path.rglob("*.zstd"))) > 0  # it died half way
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    wait_until(lambda: not any(alive(worker) for worker in workers), 20)
    assert start("prepare_process", source, tokenizer, out, "-").wait(timeout=60) == 0
    assert verify(out).splits == ["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "pids", "set", "tokenizer.json"]


def alive(process: int) -> bool:
    """Running, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
