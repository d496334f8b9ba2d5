"""The machines of a run: read from a hostfile, and asked over ssh whether they can take part.

    # DeepSpeed's format: a name that ssh knows, and its ranks (one a GPU)
    node-1 slots=8
    node-2 slots=8

Refused, in one paragraph: a line that is not of that form (with its number), a host named twice, no hosts; hosts that do not answer
(with ssh's own last line), that lack this Python or this folder, and a port for rank 0 that is in use. ssh is called as pdsh calls it for
DeepSpeed, with the options of PDSH_SSH_ARGS_APPEND, and never waits for a password.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import Refusal

NODE = Path(__file__).resolve().with_name("node.py")
SSH_FAILED = 255
_LINE = re.compile(r"(?P<name>(?:[\w.-]+@)?[\w.-]+)\s+slots=(?P<slots>\d+)\s*(?:#.*)?")
_CONNECT = 5
"""Seconds for ssh to connect."""
_ANSWER = 60.0
"""Seconds for a host to answer; Python starts slowly on a cold shared file system."""
_AT_ONCE = 64
"""Hosts asked at a time."""
_NAMED = 5
"""Hosts that a message names."""


@dataclass(frozen=True)
class Host:
    """One machine: its name for ssh, and how many ranks it takes."""

    name: str
    slots: int


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 listens for the others."""

    address: str
    port: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order. Raises Refusal, with the line, for what DeepSpeed would not read as it is meant."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"The hostfile {path} cannot be read: {error}. It is text with a line `HOST slots=RANKS` a machine.") from error
    hosts: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise Refusal(f"{path}, line {number}: `{text}` is not of the form `HOST slots=RANKS`, such as `node-1 slots=8`.")
        name, slots = match["name"], int(match["slots"])
        if slots == 0:
            raise Refusal(f"{path}, line {number}: {name} has slots=0. Give it a rank or more, or take its line out.")
        if name in hosts:
            raise Refusal(
                f"{path}, line {number}: {name} stands in line {hosts[name][0]} already. Name each machine once, with all its slots."
            )
        hosts[name] = number, Host(name, slots)
    if not hosts:
        raise Refusal(f"The hostfile {path} names no machine. Add a line such as `node-1 slots=8` for each.")
    return [host for _, host in hosts.values()]


def ssh_options() -> list[str]:
    """Options that the user has for ssh, by DeepSpeed's and pdsh's own variable."""
    return shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))


def ask(hosts: Sequence[Host], words: Sequence[str], ssh_port: int | None) -> list[subprocess.CompletedProcess[str]]:
    """Runs node.py with `words` on every host, at the same time, in this folder; what became of each, by host."""
    there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([sys.executable, '-I', str(NODE), *words])}"
    options = ["-n", "-x", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}", *ssh_options()]
    options += ["-p", str(ssh_port)] if ssh_port else []

    def one(host: Host) -> subprocess.CompletedProcess[str]:
        command = ["ssh", *options, host.name, there]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, start_new_session=True)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, SSH_FAILED, "", f"no answer in {_ANSWER:g} seconds")

    with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(one, hosts))


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What node.py answered: its last line, since a shell's start-up files may speak first."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].strip()


def meet(hosts: Sequence[Host], *, ssh_port: int | None, address: str | None, port: int | None) -> Meeting:
    """Where rank 0 will listen: on the first host. Raises Refusal unless every host answers and can run this Python in this folder."""
    answers = ask(hosts, ["probe", str(port or 0)], ssh_port)
    silent = [(host, done) for host, done in zip(hosts, answers, strict=True) if done.returncode == SSH_FAILED]
    if silent:
        flag = f"-p {ssh_port} " if ssh_port else ""
        raise Refusal(
            f"{_named(silent)}: no answer over ssh. Every host must let this user in by key, without a question: try "
            f"`ssh -o BatchMode=yes {flag}{silent[0][0].name} true`. Other options of ssh go into PDSH_SSH_ARGS_APPEND, another port into "
            f"--ssh-port. Nothing was started."
        )
    unable = [(host, done) for host, done in zip(hosts, answers, strict=True) if done.returncode]
    if unable:
        raise Refusal(
            f"{_named(unable)}: cannot take part. Every host must have this folder ({os.getcwd()}), this Python "
            f"({sys.executable}) and this project ({NODE.parent.parent}) at the same paths, as on a shared file system. Nothing was "
            f"started."
        )
    first = answer(answers[0])
    if first["port"] is None:
        raise Refusal(
            f"Port {port} is in use on {hosts[0].name}, where rank 0 would listen on it for the others: end the run that has it, or give "
            f"another --master-port (without the option a free one is taken). Nothing was started."
        )
    return Meeting(address or first["address"], first["port"])


def _named(faults: Sequence[tuple[Host, subprocess.CompletedProcess[str]]]) -> str:
    """`a (why), b (why) and 3 more`."""
    named = ", ".join(f"{host.name} ({last_line(done)})" for host, done in faults[:_NAMED])
    return named + (f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "")
