"""What the launching machine asks of a node over ssh. Standard library alone, run as a file by the node's own Python.

    python -I launchers/node.py probe PORT                   one JSON line: {"address": ..., "port": ...}
    python -I launchers/node.py signal NUMBER ADDRESS PORT   one JSON line: how many ranks of that run got the signal
    python -I launchers/node.py end ADDRESS PORT             ends that run here: SIGTERM, a grace, SIGKILL; what was left

`probe` tells the address this node was reached at, and a free TCP port: PORT itself, or any for 0; null where PORT is in use.
A run is known by where its rank 0 listens, which no two runs share: its ranks and their loader processes carry RANK, MASTER_ADDR
and MASTER_PORT in their environment, and the DeepSpeed launcher above them has --master_addr and --master_port in its command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_POLL = 0.05


def probe(port: int) -> dict[str, Any]:
    """The address others reach this node at, and `port` (any free one for 0) or None where something listens on it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of rank 0 does: a port just left is free
        try:
            listener.bind(("", port))
            free = listener.getsockname()[1]
        except OSError:
            free = None
    return {"address": own_address(), "port": free}


def own_address() -> str:
    """The address that ssh was answered at or, where that is the loopback, the first of this node's others, if it has any."""
    reached = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -").split()[2]
    if not reached.startswith("127.") and reached != "::1":
        return reached
    others = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    return others[0] if others else reached


def members(address: str, port: str) -> dict[int, int]:
    """Parent by process id of this user's ranks of a run and of the processes they started."""
    wanted = {f"MASTER_ADDR={address}".encode(), f"MASTER_PORT={port}".encode()}
    found = {}
    for process in _processes():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            if wanted <= set(variables) and any(one.startswith(b"RANK=") for one in variables) and (parent := _parent(process)):
                found[int(process.name)] = parent
    return found


def ranks(address: str, port: str) -> list[int]:
    """The ranks alone: members whose parent is none."""
    found = members(address, port)
    return [process for process, parent in found.items() if parent not in found]


def launchers(address: str, port: str) -> list[int]:
    """The DeepSpeed launchers of the run on this node."""
    wanted = {b"deepspeed.launcher.launch", f"--master_addr={address}".encode(), f"--master_port={port}".encode()}
    found = []
    for process in _processes():
        with contextlib.suppress(OSError):
            if wanted <= set((process / "cmdline").read_bytes().split(b"\0")):
                found.append(int(process.name))
    return found


def send(number: int, processes: list[int]) -> int:
    """Signals processes; how many were there to get it."""
    reached = 0
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)
            reached += 1
    return reached


def end(address: str, port: str) -> int:
    """Ends the run on this node; how many processes it had left."""
    left = len(members(address, port))
    send(signal.SIGTERM, ranks(address, port))
    deadline = time.monotonic() + _GRACE
    while members(address, port) and time.monotonic() < deadline:
        time.sleep(_POLL)
    send(signal.SIGKILL, [*launchers(address, port), *members(address, port)])
    return left


def _processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()]


def _parent(process: Path) -> int | None:
    """Its parent's id; None for a zombie, which only waits to be counted."""
    state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    return None if state == "Z" else int(parent)


def main(arguments: list[str]) -> None:
    what, *words = arguments
    if what == "probe":
        answer: Any = probe(int(words[0]))
    elif what == "signal":
        answer = send(int(words[0]), ranks(*words[1:]))
    else:
        answer = end(*words)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
