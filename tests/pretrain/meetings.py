"""Runs ranks that cannot meet, for test_rendezvous.py: each a fork of this process, so that torch is imported once.

Prints one JSON object: by attempt, what its refusal said, or `met`. Nothing else may be printed, by C++ neither.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from launchers.local import free_port
from pretrain.errors import Refusal
from pretrain.rendezvous import meet
from pretrain.runtime import process_group
from pretrain.sections import TrainSection

SECONDS = 6.0


def attempt(variables: dict[str, str], device: str, late: float) -> str:
    """Meets as the rank of these variables, `late` seconds after the start."""
    os.environ.update(variables)
    time.sleep(late)
    try:
        if "GLOO_SOCKET_IFNAME" in variables:
            with process_group(TrainSection(tokens=1, device="cpu", hang_timeout=SECONDS)):
                return "joined"
        meeting = meet(device, SECONDS)
    except Refusal as refusal:
        return str(refusal)
    time.sleep(3)  # rank 0's store lives as long as its process
    return f"met as rank {meeting.rank} of {meeting.ranks}"


def place(case: str, rank: int, ranks: int, host: str = "127.0.0.1") -> dict[str, str]:
    """The variables of a rank; each case has a port of its own."""
    port = PORTS.setdefault(case, free_port())
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": host, "MASTER_PORT": str(port)}


PORTS: dict[str, int] = {}


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    PORTS["in use"] = listener.getsockname()[1]
    attempts = {
        "in use 0": (place("in use", 0, 2), "cpu", 0.0),
        "in use 1": (place("in use", 1, 2), "cpu", 0.0),
        "nobody 1": (place("nobody", 1, 2), "cpu", 0.0),
        "elsewhere 0": (place("elsewhere", 0, 2, "rank-zero.invalid"), "cpu", 0.0),
        "missing 0": (place("missing", 0, 4), "cpu", 0.0),
        "missing 2": (place("missing", 2, 4), "cpu", 0.0),
        "worlds 0": (place("worlds", 0, 2), "cpu", 0.0),
        "worlds 1": (place("worlds", 1, 3), "cpu", 0.0),
        "larger 0": (place("larger", 0, 8), "cpu", 0.0),
        "larger 1": (place("larger", 1, 2), "cpu", 0.0),
        "devices 0": (place("devices", 0, 2), "cuda", 0.0),
        "devices 1": (place("devices", 1, 2), "cpu", 0.0),
        "twice 0": (place("twice", 0, 2), "cpu", 1.0),
        "twice 1": (place("twice", 1, 2), "cpu", 0.0),
        "twice 1 again": (place("twice", 1, 2), "cpu", 0.0),
        "many 0": (place("many", 0, 1), "cpu", 0.0),
        "many 1": (place("many", 1, 2), "cpu", 0.0),
        "interface 0": (place("interface", 0, 1) | {"GLOO_SOCKET_IFNAME": "nosuch0"}, "cpu", 0.0),
    }
    with ProcessPoolExecutor(len(attempts), multiprocessing.get_context("fork")) as pool:
        answers = {name: pool.submit(attempt, *arguments) for name, arguments in attempts.items()}
        json.dump({"ports": PORTS, "said": {name: answer.result() for name, answer in answers.items()}}, sys.stdout)


if __name__ == "__main__":
    main()
