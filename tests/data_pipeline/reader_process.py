"""A process that reads a set as a training run does, for tests that need several of them, or one to kill.

python -m tests.data_pipeline.reader_process PATH CACHE|- STEPS LOG: appends one line a step, {"samples": [...], "state": {...}}, and resumes from the last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline import TokenLoader


def main(path: str, cache: str, steps: str, log: str) -> None:
    loader = TokenLoader([(path, 1.0)], micro_batch=4, seed=3, workers=2, cache=None if cache == "-" else cache)
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    if lines:
        loader.load_state_dict(json.loads(lines[-1])["state"])
    with open(log, "a") as file:
        for _ in range(len(lines), int(steps)):
            samples = next(loader).sample_ids.tolist()
            file.write(json.dumps({"samples": samples, "state": loader.state_dict()}) + "\n")
            file.flush()
    loader.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
