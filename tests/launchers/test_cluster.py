"""A run on several machines, with stand-ins: an ssh that runs its command here, a DeepSpeed runner that starts stand-in ranks here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers import cluster, node
from launchers.cluster import quoted
from launchers.commands.train import refuse_unfinished
from launchers.hosts import Host, Meeting, meet, read_hostfile
from launchers.local import free_port
from pretrain.errors import Refusal, RunStopped
from tests.launchers.test_local import alive, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
HOSTS = [Host("a", 1), Host("b", 1)]

SSH = """#!/usr/bin/env bash
# Notes its options, answers as the host would, and runs the command here.
printf '%s\\n' "$*" >> {folder}/asked
command=${{@: -1}} host=${{@: -2:1}}
case $host in
    dead*) echo "Warning: an identity was added" >&2; echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;;
    bare) exec bash -c 'cd /nonexistent/shared';;
    b) [[ $command == *" signal "* ]] && {{ echo 0; exit; }};;  # all ranks are found on a: the hosts are one
esac
echo "Welcome to $host"
SSH_CONNECTION=${{REACHED_AT:-"10.1.1.9 4000 10.1.1.1 22"}} exec bash -c "$command"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for ssh and pdsh on the PATH; what ssh was called with, a line each, is in `asked` of the folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"ssh": SSH.format(folder=tmp_path), "pdsh": "#!/bin/sh\n"}.items():
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key -o UserKnownHostsFile=/dev/null")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestHostfile:
    def read(self, folder: Path, text: str) -> list[Host]:
        (folder / "hosts").write_text(text)
        return read_hostfile(folder / "hosts")

    def test_hosts_in_order(self, tmp_path: Path) -> None:
        text = "# two of ours\n\nnode-2 slots=8\n  me@10.0.0.1\tslots=4  # the old one\n#node-3 slots=8\n"
        assert self.read(tmp_path, text) == [Host("node-2", 8), Host("me@10.0.0.1", 4)]

    def test_deepspeed_reads_the_same(self, tmp_path: Path) -> None:
        from deepspeed.launcher.runner import fetch_hostfile

        hosts = self.read(tmp_path, "# ours\nnode-2 slots=8 # new\n\n  node-1   slots=4\n")
        assert fetch_hostfile(str(tmp_path / "hosts")) == {host.name: host.slots for host in hosts}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a slots=1\nb\n", "line 2: `b` is not of the form `HOST slots=RANKS`"),
            ("a slots=two\n", "line 1: `a slots=two`"),
            ("a slots=-1\n", "line 1"),
            ("a slots=1 max_slots=2\n", "line 1"),
            ("a:1 slots=2\n", "line 1"),
            ("node[1-4] slots=8\n", "line 1"),
            ("a,b slots=8\n", "line 1"),
            ("a slots=0\n", "line 1: a has slots=0"),
            ("a slots=1\n# and\na slots=2\n", "line 3: a stands in line 1 already"),
            ("", "names no machine"),
            ("# a slots=1\n", "names no machine"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_with_its_line(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(Refusal) as refusal:
            self.read(tmp_path, text)
        assert said in str(refusal.value)
        assert str(tmp_path / "hosts") in str(refusal.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match=r"cannot be read: .*No such file"):
            read_hostfile(tmp_path / "hosts")


class TestMeet:
    def test_rank_0_listens_where_the_first_host_was_reached(self, ssh: Path) -> None:
        meeting = meet(HOSTS, ssh_port=2222, address=None, port=None)
        assert meeting.address == "10.1.1.1"
        with socket.create_server(("", meeting.port)):
            pass
        asked = (ssh / "asked").read_text().splitlines()
        assert len(asked) == 2
        for line in asked:
            assert "-o BatchMode=yes" in line
            assert "-i key -o UserKnownHostsFile=/dev/null -p 2222" in line

    def test_the_loopback_is_no_address_for_others(self, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REACHED_AT", "127.0.0.1 4000 127.0.1.1 22")
        named = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
        assert meet(HOSTS, ssh_port=None, address=None, port=None).address == (named or ["127.0.1.1"])[0]

    def test_what_the_user_names_is_taken(self, ssh: Path) -> None:
        port = free_port()
        assert meet(HOSTS, ssh_port=None, address="10.9.9.9", port=port) == Meeting("10.9.9.9", port)

    def test_hosts_that_do_not_answer_are_named_with_the_words_of_ssh(self, ssh: Path) -> None:
        with pytest.raises(Refusal) as refusal:
            meet([Host("a", 1), Host("dead-1", 1), Host("dead-2", 1)], ssh_port=2222, address=None, port=None)
        said, words = str(refusal.value), "({0}: connect to host {1} port 22: No route to host)"
        named = [f"dead-{number} {words.format('ssh', f'dead-{number}')}" for number in (1, 2)]
        assert said.startswith(f"{', '.join(named)}: no answer over ssh.")
        assert "`ssh -o BatchMode=yes -p 2222 dead-1 true`" in said

    def test_of_many_a_few_are_named(self, ssh: Path) -> None:
        with pytest.raises(Refusal, match=r"dead-4 \([^)]*\) and 3 more: no answer"):
            meet([Host(f"dead-{number}", 1) for number in range(8)], ssh_port=None, address=None, port=None)

    def test_a_host_without_this_folder_is_told_from_one_that_does_not_answer(self, ssh: Path) -> None:
        with pytest.raises(Refusal, match=r"bare \(.*/nonexistent/shared: No such file or directory\): cannot take part.*same paths"):
            meet([Host("a", 1), Host("bare", 1)], ssh_port=None, address=None, port=None)

    def test_a_port_in_use(self, ssh: Path) -> None:
        with socket.create_server(("", 0)) as busy:
            port = busy.getsockname()[1]
            with pytest.raises(Refusal, match=f"Port {port} is in use on a, .*--master-port"):
                meet(HOSTS, ssh_port=None, address=None, port=port)


@pytest.mark.parametrize(
    "word", ["a=1", "a=[0, 1, auto]", "a=[0,1]", "a={b: 1}", 'a=$HOME "`x`" \\ *', "a=$HOME`x`\\*'", "run.dir=50%n", "a=~ ;"]
)
def test_words_reach_a_rank_as_they_were_written(word: str) -> None:
    """Through DeepSpeed's own treatment, pdsh's (it replaces %%) and a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner(types.SimpleNamespace(user_args=[quoted(word)], user_script="train.py"), "")
    line = " ".join(runner.user_arguments).replace("%%", "%")
    assert subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, text=True).stdout == word


class TestNode:
    @pytest.fixture
    def port(self) -> str:
        return str(free_port())

    @pytest.fixture
    def start(self, port: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
        """Starts Python code as a rank of the run; it prints a line when it is ready."""
        processes: list[subprocess.Popen[str]] = []

        def start(code: str, **environment: str) -> subprocess.Popen[str]:
            variables = {**os.environ, "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": port, **environment}
            process = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        yield start
        node.send(signal.SIGKILL, list(node.members("here", port)))
        for process in processes:
            process.kill()
            process.wait()

    SLEEP = "import time; print(flush=True); time.sleep(600)"
    PARENT = "import os, time\nchild = os.fork()\nif child: print(child, flush=True)\ntime.sleep(600)"

    def test_ranks_are_known_by_their_run_and_their_children_are_not_ranks(
        self, start: Callable[..., subprocess.Popen[str]], port: str
    ) -> None:
        one, parent = start(self.SLEEP), start(self.PARENT, RANK="1")
        start(self.SLEEP, MASTER_PORT="1")
        start(self.SLEEP, MASTER_ADDR="elsewhere")
        assert sorted(node.ranks("here", port)) == sorted([one.pid, parent.pid])
        assert len(node.members("here", port)) == 3

    def test_a_signal_reaches_ranks_alone(
        self, start: Callable[..., subprocess.Popen[str]], port: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        parent = start(self.PARENT)
        (child,) = set(node.members("here", port)) - {parent.pid}
        node.main(["signal", str(int(signal.SIGTERM)), "here", port])
        assert json.loads(capsys.readouterr().out) == 1
        assert parent.wait(PATIENCE) == -signal.SIGTERM
        assert alive(child)

    def test_end_leaves_nothing(self, start: Callable[..., subprocess.Popen[str]], port: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(node, "_GRACE", 0.3)
        deaf = start(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{self.PARENT}")
        other = start(self.SLEEP, MASTER_PORT="1")
        assert node.end("here", port) == 2
        assert deaf.wait(PATIENCE) == -signal.SIGKILL
        wait_for(lambda: not node.members("here", port), "the run to be gone")
        assert other.poll() is None
        assert node.end("here", port) == 0

    def test_the_launcher_above_the_ranks_ends_too(self, port: str) -> None:
        words = ["deepspeed.launcher.launch", "--master_addr=here", f"--master_port={port}"]
        launcher = subprocess.Popen([sys.executable, "-c", self.SLEEP, *words], stdout=subprocess.DEVNULL)
        wait_for(lambda: node.launchers("here", port) == [launcher.pid], "the launcher to start")
        node.end("here", port)
        assert launcher.wait(PATIENCE) == -signal.SIGKILL


RUNNER = '''
"""Stands in for DeepSpeed's runner: starts rank.py of its folder once a host, and says what pdsh would say."""
import json, os, signal, subprocess, sys, threading
options, words = sys.argv[1:sys.argv.index("rank.py")], sys.argv[sys.argv.index("rank.py") + 1:]
port = options[options.index("--master_port") + 1]
json.dump({"options": options, "words": words, "ssh": os.environ["PDSH_SSH_ARGS_APPEND"]}, open("told", "w"))
print("a: [2026-01-01 00:00:00,000] [INFO] [launch.py:152:main] WORLD INFO DICT", flush=True)
print("a: [2026-01-01 00:00:00,000] [ERROR] [launch.py:259:main] exits with", flush=True)
def host(rank):
    place = {"RANK": str(rank), "MASTER_ADDR": "here", "MASTER_PORT": port}
    process = subprocess.Popen([sys.executable, "rank.py"], env={**os.environ, **place})
    code = process.wait() % 256
    if code: print(f"pdsh@here: {'ab'[rank]}: ssh exited with exit code {code}", file=sys.stderr, flush=True)
    codes.append(code)
codes = []
threads = [threading.Thread(target=host, args=(rank,)) for rank in (0, 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(max(codes))
'''


class TestRun:
    @pytest.fixture
    def begin(self, ssh: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
        """Starts a run whose ranks are the code given, and waits until both say that they are ready (they call `ready()`)."""
        (ssh / "deepspeed" / "launcher").mkdir(parents=True)
        for file, text in {"__init__.py": "", "launcher/__init__.py": "", "launcher/runner.py": RUNNER}.items():
            (ssh / "deepspeed" / file).write_text(text)
        processes: list[subprocess.Popen[str]] = []

        def begin(body: str, patience: float = PATIENCE) -> subprocess.Popen[str]:
            head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
            ready = "def ready():\n    open(f'pid{rank}.tmp', 'w').write(str(os.getpid()))\n    os.rename(f'pid{rank}.tmp', f'pid{rank}')\n"
            (ssh / "rank.py").write_text(head + ready + body)
            code = f"""
import sys
from pathlib import Path
from launchers import cluster
from launchers.hosts import Host, Meeting
cluster._PATIENCE = {patience}
hosts = [Host("a", 1), Host("b", 1)]
sys.exit(cluster.run(["rank.py", "demo", "a=[0, $x]"], Path("hosts"), hosts, Meeting("here", {free_port()}), 2222))"""
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=ssh, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            processes.append(process)
            wait_for(lambda: all((ssh / f"pid{rank}").exists() for rank in (0, 1)), "the ranks to start")
            return process

        yield begin
        for process in processes:
            process.kill()
            process.wait()

    @staticmethod
    def nothing_left(folder: Path) -> bool:
        return not any(alive(int((folder / f"pid{rank}").read_text())) for rank in (0, 1))

    def test_success_and_what_the_runner_was_given(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path) -> None:
        process = begin("ready(); print(f'{rank}: a word')")
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        told = json.loads((ssh / "told").read_text())
        assert told["words"] == ["demo", "a=[0, \\$x]"]
        assert [told["options"][told["options"].index(name) + 1] for name in ("--master_addr", "--ssh_port")] == ["here", "2222"]
        assert told["ssh"].startswith("-i key ")
        assert "ServerAliveInterval" in told["ssh"]
        assert not (ssh / "asked").exists(), "after success there is nothing to end"
        assert all(f"{rank}: a word" in out for rank in (0, 1))

    def test_the_launchers_routine_is_dropped_and_errors_are_not(self, begin: Callable[..., subprocess.Popen[str]]) -> None:
        out, err = begin("ready(); sys.exit('why it failed' if rank else 0)").communicate(timeout=PATIENCE)
        assert "WORLD INFO" not in out
        assert "[ERROR] [launch.py" in out
        assert "why it failed" in err
        assert "ssh exited with exit code 1" in err

    def test_a_failed_node_ends_one_that_would_wait_for_it(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path) -> None:
        process = begin("ready()\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)", patience=0.5)
        assert process.wait(PATIENCE) == 256 - signal.SIGKILL
        assert self.nothing_left(ssh)

    def test_ranks_that_stop_on_purpose_let_the_others_finish_writing(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path) -> None:
        process = begin("ready()\nif rank: sys.exit(3)\ntime.sleep(2)\nopen('checkpoint', 'w')\nsys.exit(3)", patience=0.1)
        assert process.wait(PATIENCE) == 3
        assert (ssh / "checkpoint").exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_signals_reach_every_rank(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path, number: signal.Signals) -> None:
        process = begin("""
def save(number, frame):
    open(f"saved{rank}", "w").write(str(number))
    sys.exit(3)
for one in (signal.SIGTERM, signal.SIGUSR1): signal.signal(one, save)
ready()
time.sleep(600)
""")
        process.send_signal(number)
        assert process.wait(PATIENCE) == 3
        assert [(ssh / f"saved{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2

    def test_ctrl_c(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path) -> None:
        process = begin("ready()\ntry: time.sleep(600)\nexcept KeyboardInterrupt: sys.exit(130)")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert self.nothing_left(ssh)

    def test_a_second_signal_ends_ranks_that_ignore_the_first(self, begin: Callable[..., subprocess.Popen[str]], ssh: Path) -> None:
        process = begin("signal.signal(signal.SIGTERM, lambda *_: open(f'asked{rank}', 'w'))\nready()\nwhile True: time.sleep(1)")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: all((ssh / f"asked{rank}").exists() for rank in (0, 1)), "the first signal to arrive")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert self.nothing_left(ssh)

    def test_without_pdsh(self, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cluster.shutil, "which", lambda name: None if name == "pdsh" else name)
        with pytest.raises(Refusal, match=r"needs `pdsh`.*apt install"):
            cluster.run(["rank.py"], ssh / "hosts", HOSTS, Meeting("here", 1), None)

    def test_a_folder_that_deepspeed_would_not_quote(self, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (ssh / "my runs").mkdir()
        monkeypatch.chdir(ssh / "my runs")
        with pytest.raises(Refusal, match="my runs has a character"):
            cluster.run(["rank.py"], ssh / "hosts", HOSTS, Meeting("here", 1), None)

    def test_an_environment_file_that_deepspeed_would_stumble_over(self, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(ssh))
        (ssh / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n\n# a comment\n")
        with pytest.raises(Refusal, match=r"\.deepspeed_env, line 2: `` is not of the form NAME=VALUE"):
            cluster.run(["rank.py"], ssh / "hosts", HOSTS, Meeting("here", 1), None)


def test_a_launcher_that_ended_well_is_not_believed_when_the_run_did_not(tmp_path: Path) -> None:
    """DeepSpeed's runner answers 0 when its pdsh was killed."""
    (tmp_path / "summary.json").write_text('{"step": 7, "total_steps": 20}')
    with pytest.raises(RunStopped, match="stands at step 7 of 20") as stopped:
        refuse_unfinished(tmp_path)
    assert stopped.value.code == 1
    (tmp_path / "summary.json").write_text('{"step": 20, "total_steps": 20}')
    refuse_unfinished(tmp_path)
