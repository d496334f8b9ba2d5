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
        time.sleep(0.002)


def samples_in(log: Path) -> list[list[int]]:
    return [json.loads(line)["samples"] for line in log.read_text().splitlines()]


def lines_in(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.parametrize("remote", [False, True])
def test_two_jobs_on_one_host_and_one_killed_and_restarted(small_set: Path, tmp_path: Path, remote: bool) -> None:
    """Both read the same set (through the same cache, if remote); one dies by kill -9 in the middle of an epoch and continues where its log ends."""
    loader = TokenLoader([(small_set, 1.0)], micro_batch=4, seed=3)
    expected = [next(loader).sample_ids.tolist() for _ in range(3000)]
    cache = tmp_path / "cache" if remote else "-"
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    jobs = [start("reader_process", small_set, cache, 3000, log) for log in logs]
    try:
        wait_until(lambda: lines_in(logs[0]) > 60)
        jobs[0].kill()
        assert jobs[0].wait() == -9
        text = logs[0].read_text()
        logs[0].write_text(text[: text.rindex("\n") + 1])  # the last line may be cut short
        assert 0 < len(samples_in(logs[0])) < 3000
        jobs[0] = start("reader_process", small_set, cache, 3000, logs[0])
        assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert [samples_in(log) for log in logs] == [expected, expected]
    if remote:
        assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_killed_preparation_leaves_nothing_that_looks_finished_and_no_worker(tmp_path: Path) -> None:
    source, tokenizer, out = tmp_path / "corpus.jsonl", tmp_path / "tokenizer.json", tmp_path / "set"
    texts = [f"Document {number} says: the quick brown fox.\n" * 5 for number in range(4000)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(iter(texts[:100]), 300).save(str(tokenizer))
    job = start("prepare_process", source, tokenizer, out)
    try:
        wait_until(lambda: len(list(tmp_path.rglob("*.zstd"))) > 3)
        workers = children(job.pid)
        assert len(workers) >= 2
    finally:
        job.kill()
        job.wait()
    assert not out.exists()
    wait_until(lambda: not any(alive(worker) for worker in workers), 20)
    job = start("prepare_process", source, tokenizer, out)
    assert job.wait(timeout=60) == 0
    assert verify(out).splits == ["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "set", "tokenizer.json"]


def children(process: int) -> list[int]:
    """Processes whose parent is `process`."""
    parents = {int(path.parent.name): int(path.read_text().rpartition(")")[2].split()[1]) for path in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, parent in parents.items() if parent == process]


def alive(process: int) -> bool:
    """Running, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
