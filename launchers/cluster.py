"""`--hostfile FILE`: one run on several machines, by `deepspeed --hostfile` (pdsh over ssh), watched and ended from here.

    run(["pretrain/train.py", "demo"], hosts, ...) -> exit code of the run

What is added to DeepSpeed's runner, which on a signal kills every launcher of this user on the nodes and, when a node is lost, waits:

- SIGTERM, SIGUSR1 and SIGINT are sent to every rank by ssh, so that they save or stop; a second one ends them at once.
- The first node to fail is heard of while the others run: they get time to end by themselves (longer where the ranks agreed to
  stop, codes 3, 4, 5), and are ended otherwise. A node that falls silent counts as failed after a minute.
- After a failure every node is asked to end what it still has of this run.
- Arguments reach the ranks as they were written here: DeepSpeed passes them through the nodes' shell.

Exit codes are pdsh's: the largest of the nodes', each that of its first failed rank (247: killed by SIGKILL; 255: connection lost).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from launchers.hosts import Host, Meeting, answer, ask, last_line
from launchers.local import INTERRUPTED, PR_SET_PDEATHSIG, noting_signals
from pretrain.errors import BAD_CHECKPOINT_WRITE, HUNG, NON_FINITE, SIGNALLED, VIOLATED, Refusal

_POLL = 0.05
_PATIENCE = 20.0
"""Seconds the other nodes get to end by themselves after one failed, and pdsh after all were ended."""
_AGREED = dict.fromkeys((SIGNALLED, NON_FINITE, BAD_CHECKPOINT_WRITE, VIOLATED, HUNG), 60.0)
"""The same after ranks stopped on purpose: they agreed to, and may still be writing."""
_KEEP_ALIVE = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_ENVIRONMENT_FILE = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
"""DeepSpeed's: variables for the ranks, in the user's home or the current folder."""
_NODE_FAILED = re.compile(rb"pdsh@\S+ (\S+): ssh exited with exit code (\d+)")
_ROUTINE = re.compile(rb"\[INFO\] \[(launch|runner|multinode_runner)\.py:")
"""What DeepSpeed's launchers say when all is well: the runner can be told to be quiet, those on the nodes cannot."""


def run(arguments: Sequence[str], hostfile: Path, hosts: Sequence[Host], meeting: Meeting, ssh_port: int | None) -> int:
    """Runs `python *arguments` as the ranks of `hosts`. Returns the code of the run: 0, or what the module says of codes."""
    command = _command(arguments, hostfile, meeting, ssh_port)
    environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {_KEEP_ALIVE}"}
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:  # DeepSpeed's runner takes SIGTERM as the order to end its nodes
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    with noting_signals() as received:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process alone, which tells the ranks
            preexec_fn=end_with_parent,
        )
        failures: list[int] = []
        readers = _pass_on_output(process, failures)
        code: int | None = None
        try:
            code = _watch(process, received, failures, lambda number: _signal_ranks(number, hosts, meeting, ssh_port))
            return code
        finally:
            if code != 0:
                _end(process, hosts, meeting, ssh_port)
            for reader in readers:
                reader.join()


def _command(arguments: Sequence[str], hostfile: Path, meeting: Meeting, ssh_port: int | None) -> list[str]:
    """DeepSpeed's runner, by this very Python. Raises Refusal for what it cannot carry."""
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise Refusal(f"--hostfile needs `{program}` on this machine: install it (Debian and Ubuntu: apt install openssh-client pdsh).")
    script, *words = arguments
    for path in (os.getcwd(), sys.executable, script):
        if shlex.quote(path) != path:
            raise Refusal(f"The path {path} has a character that a shell would read: DeepSpeed's launcher does not quote it. Move it.")
    for file in (Path.home() / _ENVIRONMENT_FILE, Path(_ENVIRONMENT_FILE)):
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
            if "=" not in line:
                raise Refusal(f"{file}, line {number}: `{line}` is not of the form NAME=VALUE, and DeepSpeed takes no other lines there.")
    options = ["--hostfile", str(hostfile.resolve()), "--force_multi", "--no_ssh_check", "--quiet"]
    options += ["--master_addr", meeting.address, "--master_port", str(meeting.port)]
    options += ["--ssh_port", str(ssh_port)] if ssh_port else []
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, script, *map(quoted, words)]


def quoted(word: str) -> str:
    """The word as DeepSpeed's runner must be given it, for the rank to get it as it is here.

    Words with a space it puts in double quotes, escaping those inside; others it leaves bare to pdsh (which reads %) and a shell.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _pass_on_output(process: subprocess.Popen[bytes], failures: list[int]) -> list[threading.Thread]:
    """Copies both streams, without the launchers' routine; notes in `failures` the code of each node that fails."""

    def copy(source: BinaryIO, sink: BinaryIO) -> None:
        for line in source:
            if failed := _NODE_FAILED.match(line):
                failures.append(int(failed[2]))
            if not _ROUTINE.search(line):
                sink.write(line)
                sink.flush()

    assert process.stdout is not None
    assert process.stderr is not None
    streams = ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    readers = [threading.Thread(target=copy, args=stream, daemon=True) for stream in streams]
    for reader in readers:
        reader.start()
    return readers


def _watch(process: subprocess.Popen[bytes], received: list[int], failures: list[int], pass_on: Callable[[int], bool]) -> int:
    """Waits until all nodes are done, or one has failed and the others had their time. The run's code."""
    told, deadline = 0, float("inf")
    while (code := process.poll()) is None and time.monotonic() < deadline:
        if received.count(signal.SIGINT) + received.count(signal.SIGTERM) > 1:
            break
        if told < len(received):
            if not pass_on(received[told]):
                break  # a rank had not started yet, so nothing can be saved
            if received[told] == signal.SIGINT:
                deadline = time.monotonic() + _PATIENCE
            told += 1
        if failures:
            deadline = min(deadline, time.monotonic() + _AGREED.get(failures[0], _PATIENCE))
        time.sleep(_POLL)
    if signal.SIGINT in received and code != SIGNALLED:
        return INTERRUPTED
    if code is not None:
        return code if code >= 0 else 128 - code
    return max(failures) if failures else 128 + received[-1]


def _signal_ranks(number: int, hosts: Sequence[Host], meeting: Meeting, ssh_port: int | None) -> bool:
    """Signals every rank of the run; whether all were there to get it."""
    reached = 0
    for host, done in zip(hosts, ask(hosts, ["signal", str(number), meeting.address, str(meeting.port)], ssh_port), strict=True):
        if done.returncode:
            print(f"{host.name} could not be told: {last_line(done)}", file=sys.stderr, flush=True)
        else:
            reached += answer(done)
    return reached >= sum(host.slots for host in hosts)


def _end(process: subprocess.Popen[bytes], hosts: Sequence[Host], meeting: Meeting, ssh_port: int | None) -> None:
    """Ends what the run has left, on every node and here."""
    for host, done in zip(hosts, ask(hosts, ["end", meeting.address, str(meeting.port)], ssh_port), strict=True):
        if done.returncode:
            print(f"{host.name} could not be asked to end its ranks: {last_line(done)}", file=sys.stderr, flush=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
