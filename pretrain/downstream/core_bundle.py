"""Reads the tasks of CORE from an evaluation bundle, laid out as DCLM and nanochat lay it out. No torch here.

    DIR/core.yaml             icl_tasks: a list of {label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter}
        eval_data/            dataset_uri is a file in here, JSON Lines, one example a line
        eval_meta_data.csv    columns `Eval Task` (a label) and `Random baseline` (percent right by guessing), among others

    icl_task_type         an example                                  the question
    multiple_choice       query, choices, gold                        which continuation of one context
    schema                context_options, continuation, gold         which context of one continuation
    language_modeling     context, continuation                       does greedy decoding give the continuation

Examples are shuffled with a fixed seed before `limit` takes the first ones, as nanochat does, so the same ones are asked there and here.
Refused, each by name: files that are missing, task types and fields that are not these, a damaged line, a task without a baseline.
Source: DCLM (arXiv 2406.11794); nanochat, scripts/base_eval.py.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import Refusal

TASKS, EXAMPLES, BASELINES = "core.yaml", "eval_data", "eval_meta_data.csv"
LABEL, BASELINE = "Eval Task", "Random baseline"
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_KEYS = ("label", "dataset_uri", "num_fewshot", "icl_task_type")
_OPTIONS = ("choices", "context_options")
_SHUFFLE_SEED = 1337

Example = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task and its examples. `baseline`: the share that guessing gets right."""

    label: str
    kind: str
    fewshot: int
    delimiter: str
    baseline: float
    examples: list[Example]


def read_bundle(folder: Path, limit: int | None = None) -> list[Task]:
    """The tasks of a bundle in their order, each with at most `limit` examples. Raises Refusal."""
    path = folder / TASKS
    try:
        found = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise Refusal(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    tasks = found.get("icl_tasks") if isinstance(found, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise Refusal(f"{path} lists no tasks: under `icl_tasks` it must have a list of tasks, each with {', '.join(_KEYS)}.")
    baselines = _baselines(folder / BASELINES)
    made = [_task(folder, number, entry, baselines, limit) for number, entry in enumerate(tasks, 1)]
    labels = [task.label for task in made]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise Refusal(f"{path} has the label {twice[0]} more than once. Give each task a label of its own.")
    return made


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Refusal(
            f"{path} cannot be read: {why}. An evaluation bundle is a folder with {TASKS}, {EXAMPLES}/ and {BASELINES}; "
            "give that folder to --core."
        ) from error


def _baselines(path: Path) -> dict[str, str]:
    rows = csv.DictReader(_text(path).splitlines())
    if missing := [name for name in (LABEL, BASELINE) if name not in (rows.fieldnames or ())]:
        raise Refusal(f"{path} has no column `{missing[0]}`: CORE is centred by what guessing gets right, in percent, by task label.")
    return {row[LABEL]: row[BASELINE] for row in rows}


def _task(folder: Path, number: int, entry: Any, baselines: dict[str, str], limit: int | None) -> Task:
    where = f"Task {number} of {folder / TASKS}"
    if not isinstance(entry, dict) or (missing := [key for key in _KEYS if key not in entry]):
        raise Refusal(f"{where} lacks {missing[0] if isinstance(entry, dict) else 'its keys'}: a task has {', '.join(_KEYS)}.")
    label, kind, shots = str(entry["label"]), entry["icl_task_type"], entry["num_fewshot"]
    if kind not in FIELDS:
        raise Refusal(f"{where} ({label}) has icl_task_type {kind!r}, which is none of {', '.join(FIELDS)}.")
    fewshot = shots[0] if isinstance(shots, list) and shots else shots
    if not isinstance(fewshot, int) or fewshot < 0:
        raise Refusal(f"{where} ({label}) has num_fewshot {shots!r}: write a number from 0, or a list that begins with one.")
    baseline = _share(baselines.get(label), label, folder / BASELINES)
    path = folder / EXAMPLES / str(entry["dataset_uri"])
    examples = _examples(path, kind)
    random.Random(_SHUFFLE_SEED).shuffle(examples)
    examples = examples[:limit]
    if len(examples) <= fewshot:
        raise Refusal(
            f"{label} shows {fewshot} other examples before each question, and of {path} only {len(examples)} are taken. "
            f"Give --max-per-task at least {fewshot + 1}, or a larger file."
        )
    return Task(label, kind, fewshot, str(entry.get("continuation_delimiter", " ")), baseline, examples)


def _share(percent: str | None, label: str, path: Path) -> float:
    if percent is None:
        raise Refusal(f"{path} has no row for the task {label}: add one with its `{BASELINE}` in percent (0 where guessing gets nothing).")
    try:
        share = float(percent) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise Refusal(f"{path} has the {BASELINE.lower()} {percent!r} for {label}: write percent, from 0 to below 100.")
    return share


def _examples(path: Path, kind: str) -> list[Example]:
    examples = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: JSON strings may hold U+2028 and its like
        if line.strip():
            examples.append(_example(line, kind, f"Line {number} of {path}"))
    return examples


def _example(line: str, kind: str, where: str) -> Example:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise Refusal(f"{where} is not JSON ({error}): the file is damaged. Copy it again.") from error
    if not isinstance(found, dict) or (missing := [field for field in FIELDS[kind] if field not in found]):
        lacking = missing[0] if isinstance(found, dict) else "its fields"
        raise Refusal(f"{where} lacks {lacking}: an example of type {kind} has {', '.join(FIELDS[kind])}.")
    options = next((found[field] for field in FIELDS[kind] if field in _OPTIONS), None)
    if options is not None:
        if not isinstance(options, list) or not options:
            raise Refusal(f"{where} has {options!r} where a list of {' or '.join(_OPTIONS)} must be.")
        if not isinstance(found["gold"], int) or not 0 <= found["gold"] < len(options):
            raise Refusal(f"{where} has gold {found['gold']!r}: it must be the number of the right one of {len(options)}, counted from 0.")
    return {field: _rendered(found[field], field) for field in FIELDS[kind]}


def _rendered(value: Any, field: str) -> Any:
    """As a prompt shows it: numbers among the texts as their digits."""
    if field == "gold":
        return value
    return [str(option) for option in value] if field in _OPTIONS else str(value)
