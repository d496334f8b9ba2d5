"""A run on two nodes as a user starts it, by ssh and pdsh, against one process; a node's rank that is killed, and going on.

The nodes are real as far as one machine can have them: see two_nodes.py. Losses agree within the order of summation (1e-7 a step in fp32)
and its growth over the steps: 1e-5 relative leaves room (5e-8 was measured).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.two_nodes import ADDRESSES, SSH_PORT, TwoNodes, two_nodes, why_not
from tests.pretrain.tiny_run import LENGTH, prepare_text

LAYOUT = ["layout.tensor=2", "layout.pipeline=2", "layout.zero=1"]
"""Of the 4 ranks: tensor ranks share a node, stages do not. The one process has a layout of its own."""
RANKS_A_NODE, BATCH, STEPS, BOUND = 2, 8, 10, 1e-5
SETTINGS = [
    f"train.tokens={STEPS * BATCH * LENGTH}",
    f"train.global_batch={BATCH}",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.device=cpu",
    "train.hang_timeout=120",
    f"data.sequence_length={LENGTH}",
    "model.vocabulary_size=320",
    "model.width=32",
    "model.heads=2",
    "model.backbone_layers=2",
    "optimizer.lr=1e-3",
    "optimizer.muon_lr=1e-3",
    "optimizer.eps=1e-6",
    "optimizer.betas=[0.8,0.95]",  # a shell's pattern
    "evaluation={every: 1000, tokens: 64, iterations: [0, auto]}",  # a shell's words
]
NODE_ENVIRONMENT = "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"
ROOT = Path(__file__).resolve().parents[2]
ATTRACTOR = [sys.executable, "-m", "launchers", "train"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh_check", "--ssh_port", str(SSH_PORT)]
PATIENCE = 240.0

reason = why_not()
pytestmark = [pytest.mark.skipif(bool(reason), reason=reason), pytest.mark.timeout(600)]


class Runs:
    """Runs of the tiny recipe in one folder that both nodes see."""

    def __init__(self, nodes: TwoNodes, data: Path) -> None:
        self.nodes, self.folder, self.data = nodes, nodes.folder, data
        (self.folder / ".deepspeed_env").write_text(NODE_ENVIRONMENT)
        (self.folder / "hosts").write_text("".join(f"{address} slots={RANKS_A_NODE}\n" for address in ADDRESSES))
        self.environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HOME": str(self.folder)}

    def words(self, run: str, *more: str) -> list[str]:
        return ["demo", f"data.path={self.data}", f"run.dir={run}", *SETTINGS, *more]

    def start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        return self.nodes.start(command, self.folder / f"{log}.log", self.environment)

    def attractor(self, run: str, *more: str, log: str) -> subprocess.Popen[bytes]:
        """`attractor train --hostfile` on both nodes."""
        hosts = ["--hostfile", "hosts", "--ssh-port", str(SSH_PORT)]
        return self.start([*ATTRACTOR, *self.words(run, *LAYOUT), *hosts, *more], log)

    def said(self, log: str) -> str:
        return (self.folder / f"{log}.log").read_text(errors="replace")

    def losses(self, run: str) -> dict[int, float]:
        """Loss by step, as far as the record goes; a line that is being written does not count."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}

    def wait(self, condition: Callable[[], bool], what: str, log: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}\n{self.said(log)}"
            time.sleep(0.02)

    def left(self) -> list[str]:
        """What still runs on either node."""
        return [command for node in (0, 1) for command in self.nodes.processes(node).values()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    data = prepare_text(tmp_path_factory.mktemp("text"))
    with two_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        yield Runs(nodes, data)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> dict[int, float]:
    """Loss by step of one process."""
    process = runs.start([*ATTRACTOR, *runs.words("alone")], "alone")
    assert process.wait(PATIENCE) == 0, runs.said("alone")
    return runs.losses("alone")


def test_deepspeed_on_two_nodes_equals_one_process(runs: Runs, alone: dict[int, float]) -> None:
    entry = [str(ROOT / "pretrain" / "train.py"), *runs.words("plain", *LAYOUT)]
    process = runs.start([*DEEPSPEED, "--master_addr", ADDRESSES[0], "--master_port", "29501", *entry], "plain")
    assert process.wait(PATIENCE) == 0, runs.said("plain")
    assert list(alone) == list(range(1, STEPS + 1))
    assert runs.losses("plain") == pytest.approx(alone, rel=BOUND)
    assert not runs.left()


def test_a_killed_rank_ends_both_nodes_and_resuming_gives_the_same_run(runs: Runs, alone: dict[int, float]) -> None:
    every = "checkpoint.every=1"
    process = runs.attractor("broken", every, log="killed")
    runs.wait(lambda: 3 in runs.losses("broken") or process.poll() is not None, "step 3", "killed")
    victim = next(process_id for process_id, command in runs.nodes.processes(1).items() if "--local_rank=1" in command)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE) == 256 - signal.SIGKILL, runs.said("killed")
    assert f"{ADDRESSES[1]}: ssh exited with exit code 247" in runs.said("killed")
    assert not runs.left()

    process = runs.attractor("broken", every, "--resume", log="asked")
    runs.wait(lambda: ": step " in runs.said("asked") or process.poll() is not None, "the resumed run to train", "asked")
    os.kill(_launcher(process), signal.SIGTERM)
    assert process.wait(PATIENCE) == 3, runs.said("asked")
    assert "and saved. Go on with --resume." in runs.said("asked")
    assert not runs.left()

    assert runs.attractor("broken", every, "--resume", log="whole").wait(PATIENCE) == 0, runs.said("whole")
    assert "The run is whole in broken." in runs.said("whole")
    assert runs.losses("broken") == pytest.approx(alone, rel=BOUND)
    starts = [start["step"] for start in json.loads((runs.folder / "broken" / "run.json").read_text())["starts"]]
    assert 0 == starts[0] < starts[1] < starts[2] < STEPS
    assert not runs.left()


def _launcher(process: subprocess.Popen[bytes]) -> int:
    """`ip netns exec` becomes what it is asked to run, so this is `attractor train` itself."""
    assert b"launchers" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return process.pid


def test_a_host_that_cannot_be_reached_is_named(runs: Runs) -> None:
    (runs.folder / "more-hosts").write_text(f"{ADDRESSES[0]} slots=2\n{ADDRESSES[1]} slots=1\n10.77.0.9 slots=1\n")
    process = runs.start([*ATTRACTOR, *runs.words("nowhere"), "--hostfile", "more-hosts", "--ssh-port", str(SSH_PORT)], "nowhere")
    assert process.wait(PATIENCE) == 2
    said = runs.said("nowhere")
    assert said.startswith(f"error: 10.77.0.9 (ssh: connect to host 10.77.0.9 port {SSH_PORT}: ")
    assert said.count("\n") == 1
    assert not (runs.folder / "nowhere").exists()


def test_a_port_that_is_taken_on_the_first_node_is_named(runs: Runs) -> None:
    process = runs.attractor("taken", "--master-port", str(SSH_PORT), log="taken")
    assert process.wait(PATIENCE) == 2
    assert runs.said("taken").startswith(f"error: Port {SSH_PORT} is in use on {ADDRESSES[0]}")
    assert runs.said("taken").count("\n") == 1
