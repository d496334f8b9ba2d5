"""Two machines in one: two network namespaces joined by a cable, in each an sshd, processes and shared memory of its own.

    with two_nodes(folder) as nodes:
        process = nodes.start(["attractor", "train", ...])      on the first node, which reaches both by ssh and pdsh
        nodes.processes(1)                                      what runs on the second

    namespace A, eth0 10.77.0.1:2222  ───────────── namespace B, eth0 10.77.0.2:2222

Both see the same files, as machines with a shared file system do. sshd is the first process of a process namespace, so that when it is
killed everything on its node is, and a node sees its own processes alone. /dev/shm is private, because shared memory has names. Keys are
made for the occasion. Needs root; leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSH_PORT = 2222
_PATIENCE = 60.0
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
_PROGRAMS |= {"pdsh": "pdsh"}
_SSHD = """\
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PrintMotd no
"""
_numbers = itertools.count()


def why_not() -> str:
    """The reason two nodes cannot be had here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = {package for program, package in _PROGRAMS.items() if shutil.which(program, path=path) is None}
    if missing:
        return f"not installed: {', '.join(sorted(missing))}"
    name = f"two-nodes-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class TwoNodes:
    """The two nodes while they are up. Made by `two_nodes`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"two-nodes-{os.getpid()}-{next(_numbers)}" for _ in ADDRESSES]
        self.servers: list[subprocess.Popen[bytes]] = []
        self.started: list[subprocess.Popen[bytes]] = []
        self.ssh_options = f"-i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"

    def up(self) -> None:
        """Brings both nodes up. Raises CalledProcessError where the system refuses, AssertionError where sshd does not answer."""
        for name in self.names:
            _system("ip", "netns", "add", name)
        first, second = self.names
        _system("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        self._write_keys()
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _system("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _system("ip", "-n", name, "link", "set", device, "up")
            self.servers.append(self._serve(name))
        for address in ADDRESSES:
            self._wait_for(address)

    def down(self) -> None:
        """Ends everything, in whatever state it is."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for server in self.servers:
            server.kill()  # and with it, by --kill-child, the first process of its namespace, and with that all others there
            server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # the cable goes with its ends

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command on the first node, in `folder`, its output in `log`."""
        whole = ["ip", "netns", "exec", self.names[0], *command]
        variables = {**os.environ, "PDSH_SSH_ARGS_APPEND": self.ssh_options, **environment}
        with log.open("wb") as sink:
            process = subprocess.Popen(
                whole, cwd=self.folder, env=variables, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        self.started.append(process)
        return process

    def processes(self, node: int) -> dict[int, str]:
        """Command line by process id of what runs on a node, without its sshd and what has ended."""
        own = os.readlink(f"/proc/{self.servers[node].pid}/ns/pid_for_children")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # no process, or one that ended meanwhile
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == own and words and not words.startswith("sshd"):
                    found[int(entry.name)] = words
        return found

    def _write_keys(self) -> None:
        for name in ("key", "host"):
            _system("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        shutil.copy(self.folder / "key.pub", self.folder / "authorized")
        (self.folder / "sshd.conf").write_text(_SSHD.format(port=SSH_PORT, folder=self.folder))

    def _serve(self, name: str) -> subprocess.Popen[bytes]:
        alone = "unshare --mount --pid --fork --mount-proc --kill-child"
        private = "mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd"
        command = f"exec ip netns exec {name} {alone} sh -c '{private} && exec $(command -v sshd) -D -e -f {self.folder}/sshd.conf'"
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(["sh", "-c", command], env={**os.environ, "PATH": path}, stdout=log, stderr=log, start_new_session=True)

    def _wait_for(self, address: str) -> None:
        command = ["ip", "netns", "exec", self.names[0], "ssh", "-n", "-o", "BatchMode=yes", *self.ssh_options.split()]
        deadline = time.monotonic() + _PATIENCE
        while (tried := subprocess.run([*command, "-p", str(SSH_PORT), address, "true"], capture_output=True, text=True)).returncode:
            logs = "\n".join(log.read_text() for log in self.folder.glob("two-nodes-*.log"))
            assert time.monotonic() < deadline, f"sshd at {address} does not answer: {tried.stderr}\n{logs}"
            time.sleep(0.1)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Both nodes, up; down again at the end, whatever happened."""
    nodes = TwoNodes(folder)
    try:
        nodes.up()
        yield nodes
    finally:
        nodes.down()


def _system(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
