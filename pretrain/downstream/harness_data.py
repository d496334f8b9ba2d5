"""Documents of the tasks in tasks/, from two files of JSON Lines; nothing is downloaded.

    lambada_test.jsonl.gz    {"text"}                                    5,153 passages: LAMBADA's test set in OpenAI's version
    blimp.jsonl.gz           {"sentence_good", "sentence_bad", "UID"}    67 paradigms of 1,000 pairs (Warstadt et al. 2020)

They are looked for in the folder `tasks_data` (`attractor evaluate --tasks-data DIR`; lm-eval's command line: `--metadata`), else in
$ATTRACTOR_DATA/evals. lm-eval calls these functions with a task's metadata and dataset_kwargs together.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from pretrain.errors import Refusal


def lambada(tasks_data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """All passages."""
    return {"test": Dataset.from_list(_read(tasks_data, "lambada_test.jsonl.gz", ("text",)))}


def blimp(paradigm: str, tasks_data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The pairs of one paradigm."""
    pairs = _read(tasks_data, "blimp.jsonl.gz", ("sentence_good", "sentence_bad", "UID"))
    found = [pair for pair in pairs if pair["UID"] == paradigm]
    if not found:
        raise Refusal(f"blimp.jsonl.gz has no pair of the paradigm {paradigm}: it is not whole. Fetch it again.")
    return {"train": Dataset.from_list(found)}


def _read(folder: str | None, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    home = os.environ.get("ATTRACTOR_DATA")
    if folder is None and home is None:
        raise Refusal(
            f"The task needs {name} and was not told where it is: give its folder with --tasks-data, or set ATTRACTOR_DATA to a folder "
            "whose subfolder `evals` has it."
        )
    path = Path(folder) / name if folder is not None else Path(str(home), "evals", name)
    try:
        about = path.stat()
        return _documents(path, fields, (about.st_mtime_ns, about.st_size))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refusal(
            f"The task needs {path}, which cannot be read ({reason}). Put it there, or name its folder with --tasks-data."
        ) from error


@lru_cache(maxsize=1)
def _documents(path: Path, fields: tuple[str, ...], stamp: tuple[int, int]) -> list[dict[str, Any]]:
    """The file's objects, those fields of them. Read once for 67 paradigms; `stamp` tells a file that was replaced."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
                found.append({field: document[field] for field in fields})
            except (ValueError, KeyError, TypeError) as error:
                raise Refusal(f"{path}, line {number}, is no JSON object with {', '.join(fields)}: fetch the file again.") from error
    return found
