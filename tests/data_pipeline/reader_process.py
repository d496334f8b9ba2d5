"""A process that reads a set as a training run does, for tests that need several of them, or one that dies.

python -m tests.data_pipeline.reader_process PATH CACHE|- STEPS LOG DIE_AFTER

Appends one line a step, {"samples": [...], "state": {...}}, to LOG and resumes from its last one. Waits for a file `go` beside LOG before
it reads, so that several read at once; kills itself (-9) after DIE_AFTER steps (0: never).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from data_pipeline import TokenLoader


def main(path: str, cache: str, steps: int, log: Path, die_after: int) -> None:
    loader = TokenLoader([(path, 1.0)], micro_batch=4, seed=3, workers=2, cache=None if cache == "-" else cache)
    lines = log.read_text().splitlines() if log.exists() else []
    if lines:
        loader.load_state_dict(json.loads(lines[-1])["state"])
    log.with_suffix(".ready").touch()
    while not (log.parent / "go").exists():
        time.sleep(0.002)
    with open(log, "a") as file:
        for step in range(len(lines), steps):
            samples = next(loader).sample_ids.tolist()
            file.write(json.dumps({"samples": samples, "state": loader.state_dict()}) + "\n")
            file.flush()
            if step + 1 == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
    loader.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
