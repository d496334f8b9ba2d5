"""Ranks that were not started alike refuse, each with the same paragraph, and it says what differs, where, and the remedy."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest

from pretrain import startup
from pretrain.config import load_recipe
from pretrain.errors import Refusal, name_ranks
from pretrain.startup import Start, agree_on_start, differences
from tests.distributed.ranks import run_ranks

HERE = socket.gethostname()
CHANGED = "train.seed is 7 (rank 0: 0), optimizer.betas is [0.9, 0.95] (rank 0: [0.8, 0.95])"
OVERRIDES = ["data.path=somewhere", "model.width=64"]


def all_cases() -> dict[str, str | None]:
    """On each of two ranks: what agree_on_start says when rank 1 answers otherwise."""
    from pretrain.agreement import rank

    own = startup.code(), startup.versions(), startup.device()
    recipe = load_recipe("demo", OVERRIDES).to_yaml()
    others: dict[str, Any] = {
        "alike": {},
        "layout of the text": {"recipe": "# a comment\n" + recipe},
        "code": {"code": {**own[0], "pretrain/step.py": "0" * 16} | {"model/extra.py": "1" * 16}},
        "torch": {"versions": {**own[1], "torch": "2.13.0"}},
        "recipe": {"recipe": load_recipe("demo", [*OVERRIDES, "train.seed=7", "optimizer.betas=[0.9, 0.95]"]).to_yaml()},
        "device": {"device": "cuda 9.0"},
        "all": {"code": {}, "versions": {**own[1], "python": "3.12.0"}, "device": "cuda 9.0", "recipe": "train: {seed: 1}"},
    }
    said: dict[str, str | None] = {}
    for name, answers in others.items():
        answers = answers if rank() == 1 else {}
        startup.code = lambda answers=answers: answers.get("code", own[0])  # type: ignore[assignment,misc]
        startup.versions = lambda answers=answers: answers.get("versions", own[1])  # type: ignore[assignment,misc]
        startup.device = lambda answers=answers: answers.get("device", own[2])  # type: ignore[assignment,misc]
        try:
            agree_on_start(answers.get("recipe", recipe))
            said[name] = None
        except Refusal as refusal:
            said[name] = str(refusal)
    return said


@pytest.fixture(scope="module")
def told() -> list[dict[str, str | None]]:
    return run_ranks("tests.pretrain.test_startup:all_cases", 2)


def test_ranks_alike_go_on_whatever_the_layout_of_the_text(told: list[dict[str, Any]]) -> None:
    assert [name for name, said in told[0].items() if said is None] == ["alike", "layout of the text"]


def test_every_rank_says_the_same(told: list[dict[str, Any]]) -> None:
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("code", f"other code than rank 0's in pretrain/step.py, model/extra.py on rank 1 on {HERE}.", "same checkout"),
        ("torch", f"torch is 2.13.0 (rank 0: {startup.versions()['torch']}) on rank 1 on {HERE}.", "same versions"),
        ("recipe", f"{CHANGED} on rank 1 on {HERE}.", "same overrides"),
        ("device", f"device is cuda 9.0 (rank 0: cpu) on rank 1 on {HERE}.", "train.device"),
    ],
)
def test_a_difference_is_told_with_its_remedy_alone(told: list[dict[str, Any]], name: str, words: str, remedy: str) -> None:
    said = told[0][name]
    assert said.startswith(f"The ranks of this run were not started alike: {words} Nothing was touched.")
    assert [other for other in startup._REMEDIES.values() if other in said] == [
        text for text in startup._REMEDIES.values() if remedy in text
    ]


def test_many_differences_are_counted(told: list[dict[str, Any]]) -> None:
    said = told[0]["all"]
    assert f" more on rank 1 on {HERE}; python is 3.12.0" in said
    assert all(remedy in said for remedy in startup._REMEDIES.values())


def test_ranks_that_differ_in_the_same_way_are_told_together() -> None:
    parts = [{"code": {"a.py": "1"}}, {"code": {"a.py": "2"}}, {"code": {"a.py": "2"}}, {"code": {"a.py": "1", "b.py": "1"}}]
    starts = [Start(f"node-{rank // 2}", part) for rank, part in enumerate(parts)]
    assert differences(starts) == {
        "code": "other code than rank 0's in a.py on ranks 1-2 on node-0, node-1; other code than rank 0's in b.py on rank 3 on node-1"
    }


def test_the_code_is_every_python_file_that_a_run_executes() -> None:
    files = startup.code()
    assert {path.split("/")[0] for path in files} == {"data_pipeline", "model", "pretrain"}
    own = Path(startup.__file__)
    assert files["pretrain/startup.py"] == hashlib.sha256(own.read_bytes()).hexdigest()[:16]


def test_names_of_ranks() -> None:
    hosts = [f"node-{rank // 2}" for rank in range(12)]
    assert name_ranks([3], hosts) == "rank 3 on node-1"
    assert name_ranks([5, 0, 1, 2], hosts) == "ranks 0-2, 5 on node-0, node-1, node-2"
    assert name_ranks(range(12), hosts) == "ranks 0-11 on node-0, node-1, node-2, node-3 and 2 more hosts"
