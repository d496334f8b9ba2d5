"""The command line: help for newcomers, JSON and nothing else, one paragraph and a code for everything that goes wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import ORDER, app
from launchers.commands import train
from launchers.commands.bench import parse_counts
from launchers.commands.evaluate import parse_iterations
from launchers.hosts import Host, Meeting
from launchers.local import ALONE, Place
from launchers.output import deliver, print_error, si, size
from pretrain.errors import Refusal, RunStopped

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    ("data", "prepare"),
    ("data", "verify"),
    ("data", "stats"),
    ("plan",),
    ("train",),
    ("sweep",),
    ("study",),
    ("launch", "slurm"),
    ("launch", "k8s"),
    ("launch", "hostfile"),
    ("evaluate",),
    ("compare",),
    ("checkpoint", "ls"),
    ("checkpoint", "verify"),
    ("checkpoint", "convert"),
    ("export",),
    ("import",),
    ("generate",),
    ("bench", "step"),
    ("bench", "models"),
    ("bench", "reasoning"),
    ("bench", "data"),
    ("bench", "generate"),
    ("bench", "checkpoint"),
    ("doctor",),
    ("demo",),
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """Puts a module with these functions in the place of a heavy one."""
    fake = types.ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


class TestHelp:
    def test_lists_every_command_in_the_order_of_work(self) -> None:
        text = run("--help").stdout
        assert [text.index(f"│ {name} ") for name in ORDER] == sorted(text.index(f"│ {name} ") for name in ORDER)
        assert {words[0] for words in COMMANDS} == set(ORDER)

    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_every_command_shows_an_example(self, words: tuple[str, ...]) -> None:
        result = run(*words, "--help")
        assert result.exit_code == 0
        assert "Example" in result.stdout
        assert f"attractor {' '.join(words)}" in re.sub(r"\s+", " ", result.stdout)

    def test_train_lists_its_exit_codes(self) -> None:
        text = re.sub(r"\s+", " ", run("train", "--help").stdout)
        for code in ("0 trained", "2 refused", "3 stopped", "4 too many", "5 a checkpoint", "6 ranks", "7 a rank", "130 interrupted"):
            assert code in text

    def test_examples_of_overrides_are_real_keys(self) -> None:
        from pretrain.config import KEYS

        for key in re.findall(r"(\w+\.\w+)=", train.EPILOG):
            assert key in KEYS


class TestErrors:
    def test_control_characters_of_a_name_do_not_reach_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_error("the tensor a\x1b[2Jb\r is unknown")
        assert capsys.readouterr().err == "error: the tensor a\\x1b[2Jb\\r is unknown\n"

    def test_refusals_are_one_paragraph_on_stderr_and_exit_2(self) -> None:
        result = run("plan", "demo", "train.toknes=3")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: There is no key `train.toknes`")
        assert result.stderr.count("\n") == 1

    def test_markup_in_a_message_stays_text(self) -> None:
        assert "[bold]x" in run("plan", "[bold]x").stderr

    def test_stopped_runs_exit_with_their_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def evaluate_run(*_: Any, **__: Any) -> None:
            raise RunStopped("The disk is full.", 5)

        stand_in(monkeypatch, "pretrain.evaluate", evaluate_run=evaluate_run)
        result = run("evaluate", str(ROOT))
        assert (result.exit_code, result.stdout) == (5, "")
        assert "The disk is full." in result.stderr

    def test_ctrl_c_is_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def evaluate_run(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        stand_in(monkeypatch, "pretrain.evaluate", evaluate_run=evaluate_run)
        result = run("evaluate", str(ROOT))
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")

    def test_bugs_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def evaluate_run(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        stand_in(monkeypatch, "pretrain.evaluate", evaluate_run=evaluate_run)
        assert isinstance(run("evaluate", str(ROOT)).exception, ZeroDivisionError)

    @pytest.mark.parametrize("text", ["", "1,,2", "-1", "sometimes", "1.5"])
    def test_malformed_iterations(self, text: str) -> None:
        with pytest.raises(Refusal, match="0,1,2,4,auto"):
            parse_iterations(text)

    @pytest.mark.parametrize("text", ["", "0,1", "automatic"])
    def test_malformed_counts(self, text: str) -> None:
        with pytest.raises(Refusal, match="1,8,64"):
            parse_counts(text)


class TestTrain:
    @pytest.fixture
    def prepared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = types.SimpleNamespace(split=lambda name, where: None)
        monkeypatch.setattr(train, "open_manifest", lambda path, cache: manifest)

    def test_one_process_trains_here(self, monkeypatch: pytest.MonkeyPatch, prepared: None, tmp_path: Path) -> None:
        calls: list[Any] = []
        monkeypatch.setattr("pretrain.train.run", lambda *arguments: calls.append(arguments))
        folder = f"run.dir={tmp_path / 'run'}"
        assert run("train", "demo", "data.path=x", folder).exit_code == 0
        assert calls == [("demo", ["data.path=x", folder], False)]

    def test_a_missing_validation_split_is_found_before_the_first_step(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def split(name: str, where: str) -> None:
            if (name, where) == ("validation", "a"):
                raise Refusal("a has no split 'validation'")

        monkeypatch.setattr(train, "open_manifest", lambda path, cache: types.SimpleNamespace(split=split))
        monkeypatch.setattr("pretrain.train.run", lambda *_: None)
        assert "no split" in run("train", "demo", "data.path=a", f"run.dir={tmp_path}").stderr
        mixture = "data.path=[{path: b, weight: 1}, {path: a, weight: 1}]"  # evaluated on its first set
        assert run("train", "demo", mixture, f"run.dir={tmp_path}").exit_code == 0

    def test_several_processes_are_launched_with_the_same_words(
        self, monkeypatch: pytest.MonkeyPatch, prepared: None, tmp_path: Path
    ) -> None:
        calls: list[Any] = []

        def launch(arguments: list[str], ranks: int, place: Place) -> int:
            calls.append((arguments, ranks, place))
            return 4

        monkeypatch.setattr(train, "launch", launch)
        words = ["demo", "data.path=x", "train.micro_batch=4", f"run.dir={tmp_path / 'run'}"]
        assert run("train", *words, "--procs", "2").exit_code == 4
        assert calls == [([str(train.ENTRY), *words], 2, ALONE)]
        assert train.ENTRY.is_file()

    def test_each_of_several_machines_launches_its_share(self, monkeypatch: pytest.MonkeyPatch, prepared: None, tmp_path: Path) -> None:
        calls: list[Any] = []
        monkeypatch.setattr(train, "launch", lambda arguments, ranks, place: calls.append((ranks, place)) or 0)
        words = [
            "demo",
            "data.path=x",
            "train.micro_batch=8",
            f"run.dir={tmp_path / 'run'}",
            "--master-addr",
            "a",
            "--master-port",
            "29999",
        ]
        first = run("train", *words, "--nodes", "2", "--node-rank", "0")
        second = run("train", *words, "--nodes", "2", "--node-rank", "1")
        assert calls == [(1, Place(0, 2, "a", 29999)), (1, Place(1, 2, "a", 29999))]
        assert "is whole" in first.stdout
        assert second.stdout == ""

    def test_the_machines_of_a_hostfile_get_the_same_words(self, monkeypatch: pytest.MonkeyPatch, prepared: None, tmp_path: Path) -> None:
        calls: list[Any] = []
        monkeypatch.setattr(train, "meet", lambda hosts, **options: calls.append((hosts, options)) or Meeting("10.0.0.1", 29999))
        monkeypatch.setattr(train.cluster, "run", lambda *arguments: calls.append(arguments) or 3)
        file = tmp_path / "hosts"
        file.write_text("a slots=1\nb slots=3\n")
        words = ["demo", "data.path=x", "train.micro_batch=2", f"run.dir={tmp_path}"]
        (tmp_path / "config.yaml").touch()
        result = run("train", *words, "--resume", "--hostfile", str(file), "--ssh-port", "2222", "--master-addr", "c")
        hosts = [Host("a", 1), Host("b", 3)]
        assert result.exit_code == 3
        assert calls[0] == (hosts, {"ssh_port": 2222, "address": "c", "port": None})
        assert calls[1] == ([str(train.ENTRY), *words, "--resume"], file, hosts, Meeting("10.0.0.1", 29999), 2222)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["data.path=x", "--procs", "3"], "3 data ranks"),
            ([], "data.path is missing"),
            (["data.path=x", "--resume", "run.dir=/nonexistent/run"], "no run to resume"),
            (["data.path=x", "--procs", "3", "layout.tensor=2"], "divide this world of 3"),
            (["data.path=x", "--hostfile", "HOSTS", "--procs", "2"], "leave out --procs"),
            (["data.path=x", "--hostfile", "HOSTS", "--nodes", "1"], "leave out --procs"),
            (["data.path=x", "--hostfile", "HOSTS"], "3 data ranks"),
            (["data.path=x", "--hostfile", "HOSTS", "layout.tensor=2"], "divide this world of 3"),
            (["data.path=x", "--hostfile", "NOWHERE"], "NOWHERE cannot be read"),
            (["data.path=x", "--node-rank", "1"], "add --nodes, or --hostfile"),
            (["data.path=x", "--nodes", "2", "--node-rank", "2"], "none of --nodes 2"),
            (["data.path=x", "--nodes", "2"], "needs --master-addr and --master-port"),
            (["data.path=x", "--nodes", "2", "--master-addr", "a", "--master-port", "BUSY"], "is in use on this machine"),
        ],
    )
    def test_refused_before_any_process_starts(
        self, monkeypatch: pytest.MonkeyPatch, prepared: None, tmp_path: Path, words: list[str], said: str
    ) -> None:
        for place, name in ((train, "launch"), (train, "meet"), (train.cluster, "run")):
            monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("started"))
        monkeypatch.setattr("pretrain.train.run", lambda *_: pytest.fail("started"))
        (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
        with socket.create_server(("", 0)) as busy:
            known = {"HOSTS": str(tmp_path / "hosts"), "BUSY": str(busy.getsockname()[1])}
            result = run("train", "demo", *(known.get(word, word) for word in words))
        assert result.exit_code == 2
        assert said in result.stderr

    def test_data_that_was_not_prepared_is_refused(self, tmp_path: Path) -> None:
        result = run("train", "demo", f"data.path={tmp_path}")
        assert result.exit_code == 2
        assert "attractor data prepare" in result.stderr


class TestJson:
    def test_what_libraries_print_goes_to_stderr(self, capfd: pytest.CaptureFixture[str]) -> None:
        def compute() -> dict[str, int]:
            print("a library speaks")
            os.write(1, b"from below Python\n")
            return {"a": 1}

        deliver(True, compute, lambda _: None)
        said = capfd.readouterr()
        assert json.loads(said.out) == {"a": 1}
        assert "a library speaks" in said.err
        assert "from below Python" in said.err

    def test_evaluate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        report = {
            "run": "r",
            "kind": "attractor",
            "step": 7,
            "weights": "last",
            "loss": {"0": 2.0, "auto": 1.0},
            "perplexity": {"0": 7.4, "auto": 2.7},
            "tokens": 100,
            "iterations": {"auto": 3.5},
            "proposal_distance": 0.5,
            "converged": 1.0,
        }

        def evaluate_run(folder: Path, iterations: Any, *, progress: Any) -> dict[str, Any]:
            progress(0.5)
            calls.append((folder, iterations))
            return report

        stand_in(monkeypatch, "pretrain.evaluate", evaluate_run=evaluate_run)
        result = run("evaluate", str(ROOT), "--solver-iterations", "0, 4,auto", "--json")
        assert json.loads(result.stdout) == report
        assert calls == [(ROOT, [0, 4, "auto"])]
        shown = run("evaluate", str(ROOT)).stdout
        assert "2.0000" in shown
        assert "3.50" in shown
        assert calls[-1] == (ROOT, None)

    def test_bench_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"iterations": 1, "evaluations": 1, "step_seconds": 0.25, "tokens_per_second": 12345.0, "memory_bytes": 2**30}
        stand_in(monkeypatch, "pretrain.bench", bench_step=lambda recipe, iterations, steps: [{**row, "iterations": i} for i in iterations])
        assert [one["iterations"] for one in json.loads(run("bench", "step", "--iterations", "1,8", "--json").stdout)] == [1, 8]
        shown = run("bench", "step").stdout
        assert "12.3 k" in shown
        assert "1 GiB" in shown

    def test_bench_step_that_the_system_ended_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def bench_step(*_: Any) -> None:
            raise BrokenProcessPool("terminated abruptly")

        stand_in(monkeypatch, "pretrain.bench", bench_step=bench_step)
        result = run("bench", "step")
        assert (result.exit_code, "train.micro_batch" in result.stderr) == (2, True)

    def test_plan_in_a_process_where_torch_must_not_be_imported(self) -> None:
        code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'attractor'; from launchers.cli import main; main()"
        command = [sys.executable, "-c", code, "plan", "attractor-140m", "--gpus", "8", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["batch"]["data_ranks"] == 8
        assert done.stderr == ""


def test_plan_fits_80_columns() -> None:
    for name in ("attractor-1.3b", "transformer-770m", "demo"):
        assert max(len(line) for line in run("plan", name, "--gpus", "2", "train.micro_batch=8").stdout.splitlines()) <= 80


def test_data_commands_on_real_text(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(f"Document {number} says that {number} is a number." for number in range(300)))
    options = ["--vocab-size", "300", "--sequence-length", "16", "--validation", "0"]
    prepared = run("data", "prepare", str(text), "--out", str(out), *options, "--json")
    assert prepared.exit_code == 0, prepared.stderr
    manifest = json.loads(prepared.stdout)
    assert manifest["sequence_length"] == 16
    verified = json.loads(run("data", "verify", str(out), "--json").stdout)
    assert verified["tokens"] == manifest["splits"]["train"]["tokens"]
    counted = json.loads(run("data", "stats", str(out), "--json").stdout)
    assert counted["splits"]["train"]["tokens"] == verified["tokens"]
    assert "is whole" in run("data", "verify", str(out)).stdout
    assert "Splits" in run("data", "stats", str(out)).stdout
    again = run("data", "prepare", str(text), "--out", str(out), "--vocab-size", "300")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (12, "12"), (999.6e6, "1000 M"), (1.0835e9, "1.08 G"), (14e18, "14 E")])
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1023 * 2**20, "1023 MiB"), (1.5 * 2**30, "1.5 GiB")])
def test_size(value: float, text: str) -> None:
    assert size(value) == text
