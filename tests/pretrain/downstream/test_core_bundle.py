"""Bundles: what a whole one gives, and everything a damaged one is refused for, by name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pretrain.downstream.core_bundle import read_bundle
from pretrain.errors import Refusal
from tests.pretrain.downstream.core_bundles import PICK, TELL, write_bundle


def test_a_whole_bundle(tmp_path: Path) -> None:
    pick, fit, tell = read_bundle(write_bundle(tmp_path))
    assert (pick.label, pick.kind, pick.fewshot, pick.delimiter, pick.baseline) == ("pick", "multiple_choice", 1, " ", 0.5)
    assert (fit.kind, fit.fewshot, fit.delimiter) == ("schema", 0, " ")
    assert (tell.fewshot, tell.delimiter, tell.baseline) == (2, ": ", 0.0)
    shuffled = list(PICK)
    random.Random(1337).shuffle(shuffled)
    assert pick.examples == shuffled
    assert tell.examples[0].keys() == {"context", "continuation"}
    assert [task.examples for task in read_bundle(tmp_path, 3)] == [task.examples[:3] for task in (pick, fit, tell)]


def test_numbers_among_the_texts_are_their_digits(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    lines = [json.dumps({**example, "choices": [1, 2.5]}) for example in PICK]
    (tmp_path / "eval_data/some/pick.jsonl").write_text("\n".join(lines))
    assert read_bundle(tmp_path)[0].examples[0]["choices"] == ["1", "2.5"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    lines = [json.dumps({**example, "context": "one\u2028two\x85three"}, ensure_ascii=False) for example in TELL]
    (tmp_path / "eval_data/tell.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_bundle(tmp_path)[2].examples[0]["context"] == "one\u2028two\x85three"


@pytest.mark.parametrize("name", ["core.yaml", "eval_meta_data.csv", "eval_data/some/fit.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_bundle(tmp_path) / name).unlink()
    with pytest.raises(Refusal, match=f"{name} cannot be read: No such file"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("core.yaml", "schema", "ranking", r"\(fit\) has icl_task_type 'ranking', which is none of multiple_choice, schema"),
        ("core.yaml", "icl_tasks", "tasks", "lists no tasks"),
        ("core.yaml", "- label", "- [label", "is not YAML"),
        ("core.yaml", "  dataset_uri: some/fit.jsonl\n", "", "Task 2 of .*core.yaml lacks dataset_uri"),
        ("core.yaml", "num_fewshot: [0]", "num_fewshot: [many]", r"\(fit\) has num_fewshot \['many'\]"),
        ("core.yaml", "num_fewshot: [0]", "num_fewshot: [4]", "fit shows 4 other examples .* at least 5"),
        ("core.yaml", "label: fit", "label: pick", "label pick more than once"),
        ("eval_meta_data.csv", "Random baseline", "Chance", "no column `Random baseline`"),
        ("eval_meta_data.csv", "fit,x,50.0\n", "", "no row for the task fit"),
        ("eval_meta_data.csv", "50.0", "100", "has the random baseline '100' for fit"),
        ("eval_meta_data.csv", "50.0", "", "has the random baseline '' for fit"),
        ("eval_data/tell.jsonl", '"bcb"', '"bcb', r"Line 1 of .*tell.jsonl is not JSON"),
        ("eval_data/some/pick.jsonl", '"gold": 1', '"gold": 2', r"Line 3 of .*pick.jsonl has gold 2: .* one of 2"),
        ("eval_data/some/pick.jsonl", '"query": "q1"', '"ask": "q1"', r"Line 2 of .*pick.jsonl lacks query"),
        ("eval_data/some/fit.jsonl", '["it is q", "it is p"]', "[]", "Line 1 of .* where a list of"),
    ],
)
def test_what_is_damaged_is_refused_by_name(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    path = write_bundle(tmp_path) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Refusal, match=said):
        read_bundle(tmp_path)
