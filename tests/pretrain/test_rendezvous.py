"""Ranks that cannot meet: each way ends in a time, on every rank, in a paragraph that names who, where and the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import Refusal
from pretrain.rendezvous import place_of

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def meetings() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.meetings"],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing but the refusals is said"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def said(meetings: dict[str, Any]) -> dict[str, str]:
    return meetings["said"]


def test_a_port_in_use(meetings: dict[str, Any], said: dict[str, str]) -> None:
    port = meetings["ports"]["in use"]
    assert said["in use 0"].startswith("rank 0 on ")
    assert f"cannot listen on MASTER_PORT={port}" in said["in use 0"]
    assert f"no store of rank 0 at 127.0.0.1:{port} within 6 s" in said["in use 1"]


def test_rank_0_that_nobody_reaches(meetings: dict[str, Any], said: dict[str, str]) -> None:
    assert f"could not reach rank 0 at 127.0.0.1:{meetings['ports']['nobody']} within 6 s (Connection refused)" in said["nobody 1"]
    assert "MASTER_ADDR must name rank 0's own machine" in said["elsewhere 0"]


def test_ranks_that_do_not_come_are_named_on_all_others(said: dict[str, str]) -> None:
    assert said["missing 0"] == said["missing 2"]
    assert said["missing 0"].startswith("ranks 1, 3 of 4 did not come")
    assert "ranks 0, 2 on " in said["missing 0"]


def test_worlds_of_unequal_size_and_device(said: dict[str, str]) -> None:
    assert said["worlds 0"] == said["worlds 1"]
    assert "WORLD_SIZE is 3 for rank 1 on " in said["worlds 0"]
    assert said["larger 0"] == said["larger 1"]
    assert "WORLD_SIZE is 2 for rank 1 on " in said["larger 0"], "told at once, not that six more did not come"
    assert said["devices 0"] == said["devices 1"]
    assert "the device is cpu for rank 1 on " in said["devices 0"]


def test_a_rank_too_many_is_refused_and_the_others_meet(said: dict[str, str]) -> None:
    twice = sorted((said["twice 1"], said["twice 1 again"]), key=lambda text: text.startswith("met"))
    assert "has that number too" in twice[0]
    assert [said["twice 0"], twice[1]] == ["met as rank 0 of 2", "met as rank 1 of 2"]
    assert said["many 0"] == "met as rank 0 of 1"
    assert "rank 0 knows no such number" in said["many 1"]


def test_an_interface_that_is_not_there_is_a_refusal_of_the_process_group(said: dict[str, str]) -> None:
    assert "nosuch0" in said["interface 0"]
    assert "GLOO_SOCKET_IFNAME" in said["interface 0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "2"}, "RANK=2 .* from 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two .* whole number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 .* from 1 to 65535"),
    ],
)
def test_variables_that_name_no_place(change: dict[str, str], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        place_of({**GOOD, **change})


def test_the_place_a_launcher_names() -> None:
    assert place_of(GOOD)[:] == (1, 2, "node-a", 29500)
