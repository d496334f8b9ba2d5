"""`attractor sweep`: members and their folders, what is skipped, resumed and refused, how signals and failures end it, the Slurm file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers import series
from launchers.cli import app
from launchers.commands.train import ENTRY
from launchers.series import Member, override
from launchers.sweep import make_sweep, slug, split_values
from pretrain.config import load_recipe, sweep_names
from pretrain.errors import Refusal
from pretrain.overrides import parse_override
from tests.pretrain.tiny_run import prepare_text

TINY = [
    *("model.vocabulary_size=320", "model.width=32", "model.heads=2", "model.backbone_layers=1", "evaluation.tokens=64"),
    *(
        "data.sequence_length=16",
        "train.micro_batch=2",
        "train.global_batch=4",
        "train.tokens=128",
        "train.log_every=1",
        "train.device=cpu",
    ),
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sweep", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("text"))


class TestMembers:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("additive,concat", ["additive", "concat"]),
            ("[0,1,auto]", ["[0,1,auto]"]),
            ("[0,1],[0,auto]", ["[0,1]", "[0,auto]"]),
            ("{a: 1, b: [2,3]},null", ["{a: 1, b: [2,3]}", "null"]),
            ("\"a,b\",'c,d]',e", ['"a,b"', "'c,d]'", "e"]),
            ("1", ["1"]),
            ("a,", ["a", ""]),
        ],
    )
    def test_commas_in_brackets_and_quotes_do_not_divide(self, text: str, parts: list[str]) -> None:
        assert split_values(text) == parts

    def test_every_value_with_every_other_in_the_order_written(self) -> None:
        words = ["attractor.injection=additive,concat", "train.tokens=2e5", "gradient.mode=one_step,adjoint"]
        sweep = make_sweep("demo", words, Path("out"))
        assert [member.name for member in sweep.members] == [
            f"injection={injection},mode={mode}" for injection in ("additive", "concat") for mode in ("one_step", "adjoint")
        ]
        recipe = sweep.members[3].load()
        assert (recipe.attractor.injection, recipe.gradient.mode, recipe.train.tokens) == ("concat", "adjoint", 200_000)
        assert recipe.run.dir == "out/injection=concat,mode=adjoint"
        assert recipe.run.name == "injection=concat,mode=adjoint"

    def test_the_command_line_replaces_and_fixes_what_the_file_sweeps(self) -> None:
        injections = ("init_only", "concat", "additive", "cross_attention")
        assert make_sweep("ablation-injection", []).settings == [{"attractor.injection": value} for value in injections]
        replaced = make_sweep("ablation-injection", ["attractor.injection=concat,additive", "train.seed=1,2"])
        assert len(replaced.settings) == 4
        fixed = make_sweep("ablation-gradient", ["gradient.steps=2"])
        assert fixed.settings == [{"gradient.mode": mode} for mode in ("one_step", "neumann", "phantom", "adjoint")]
        assert all(member.load().gradient.steps == 2 for member in fixed.members)

    @pytest.mark.parametrize("name", sweep_names())
    def test_shipped_sweeps_have_members_with_folders_of_their_own(self, name: str) -> None:
        members = make_sweep(name, []).members
        assert len({member.run for member in members}) == len(members) >= 3
        assert all(re.fullmatch(r"[\w.=,+-]+", member.name) for member in members)

    def test_folders_are_readable_and_told_apart(self) -> None:
        assert slug({"solver.tolerance": 1e-4, "evaluation.iterations": [0, "auto"]}) == "tolerance=0.0001,iterations=-0-auto"
        assert slug({"solver.tolerance": 1.0, "gradient.tolerance": None}) == "solver.tolerance=1,gradient.tolerance=null"
        with pytest.raises(Refusal, match="would share the folder"):
            make_sweep("demo", ["evaluation.iterations=[0,1],[[0],1]"])

    @pytest.mark.parametrize("value", ["concat", "null", "1e3", "a b", "a,b", "it's", "", True, None, 3, 1e-4, [0, "auto"], {"a": 1}])
    def test_overrides_parse_back(self, value: Any) -> None:
        assert parse_override(override("run.name", value)) == ("run.name", value)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["demo"], "Nothing is swept in demo"),
            (["ablation-injection", "attractor.injection=concat"], "Nothing is swept"),
            (["demo", "solver.tolerence=1e-1,1e-2"], "Did you mean `solver.tolerance`"),
            (["demo", "solver.tolerance=1e-1,"], "empty value"),
            (["demo", "solver.tolerance=1e-1,0.1"], "twice"),
            (["demo", "solver.tolerance=1e-1,x", "--plan"], "tolerance=x: solver.tolerance=x"),
            (["demo", "model.width=64,63", "--plan"], "width=63: "),
            (["demo", "run.dir=x", "train.seed=1,2"], "--out DIR names the folder"),
            (["demo", "train.seed=1,2"], "seed=1: data.path is missing"),
        ],
    )
    def test_refusals_come_before_anything_starts_and_name_the_member(self, words: list[str], said: str, tmp_path: Path) -> None:
        refused = run(*words, "--out", str(tmp_path / "out"))
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert said in refused.stderr
        assert not (tmp_path / "out").exists()


def test_plan_says_what_would_be_trained(tmp_path: Path) -> None:
    shown = run("ablation-tolerance", "solver.tolerance=1e-2,1e-3", "--plan", "--out", str(tmp_path / "out"))
    assert shown.exit_code == 0, shown.stderr
    assert re.findall(r"(\S+): to train", shown.stdout) == ["tolerance=0.01", "tolerance=0.001"]
    assert "The same in all: parameters 1.31 M" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert not (tmp_path / "out").exists()


def test_trains_skips_resumes_and_tells_failures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sweep of three: of them one cannot be trained, since its learning rate makes nothing but NaN."""
    out = tmp_path / "out"
    words = ["demo", *TINY, f"data.path={data}", "train.nonfinite_limit=1", "optimizer.lr=1e-3,1e30", "--out", str(out)]
    starts: list[list[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(series.subprocess, "Popen", lambda command, **more: starts.append(command) or popen(command, **more))
    first = run(*words)
    assert first.exit_code == 4, first.stderr
    assert "1 of 2 members did not finish: lr=1e+30 (code 4)" in first.stderr
    rows = json.loads((out / "sweep.json").read_text())["members"]
    assert [row["state"] for row in rows] == ["finished", "failed (4)"]
    summary = json.loads((out / "lr=0.001" / "summary.json").read_text())
    done = rows[0]
    assert (done["tokens"], done["flops"], done["seconds"]) == (128, summary["flops"]["model"], summary["seconds"])
    assert done["loss"] == summary["evaluation"]["loss"]["auto"]
    assert (done["iterations"], done["converged"]) == (summary["evaluation"]["iterations"]["auto"], summary["evaluation"]["converged"])
    table = (out / "sweep.md").read_text()
    assert f"| 0.001 | {done['parameters']['total'] / 1e3:.3g} k |" in table
    assert "failed (4)" in table
    assert "lr=1e+30 trains" in first.stderr.replace("\n", " ")

    again = run(*words)
    assert again.exit_code == 4
    assert [("lr=1e+30" in " ".join(command), "--resume" in command) for command in starts] == [(False, False), (True, False), (True, True)]

    other = run(*words, "train.seed=5")
    assert other.exit_code == 2
    assert "lr=0.001: " in other.stderr
    assert "train.seed=0 (asked for: 5)" in other.stderr
    assert len(starts) == 3


def test_an_interrupt_saves_the_running_member_and_ends_the_sweep(data: Path, tmp_path: Path) -> None:
    """Ctrl-C is told to the member as SIGTERM is, and the second one never begun."""
    slow = [word for word in TINY if not word.startswith("train.tokens")]
    words = ["sweep", "demo", *slow, f"data.path={data}", "train.seed=1,2", "--out", str(tmp_path / "out"), "train.tokens=64000"]
    process = subprocess.Popen([sys.executable, "-m", "launchers", *words], stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics, deadline = tmp_path / "out" / "seed=1" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    assert "seed=1 has saved. The same command goes on from here." in said
    assert list((tmp_path / "out" / "seed=1" / "checkpoints").iterdir())
    assert not (tmp_path / "out" / "seed=2").exists()
    planned = run(*words[1:], "--plan")
    assert re.findall(r"interrupted|to train", planned.stdout) == ["interrupted", "to train"]


class TestSlurm:
    def script(self, data: Path, folder: Path) -> str:
        words = ["demo", *TINY, f"data.path={data}", "train.seed=1,2", "--slurm", "--out", str(folder / "out")]
        printed = run(*words)
        assert printed.exit_code == 0, printed.stderr
        return printed.stdout

    def test_submits_an_array_and_then_the_table(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "job").write_text(self.script(data, tmp_path))
        (tmp_path / "sbatch").write_text('#!/usr/bin/env bash\necho "$@" >> submitted\necho "7;cluster"\n')
        (tmp_path / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert subprocess.run(["bash", "job"], cwd=tmp_path).returncode == 0
        array, table = (tmp_path / "submitted").read_text().splitlines()
        assert array == "--parsable --array=0,1 job"
        assert table.endswith("--dependency=afterok:7 job table")

    def test_the_table_is_made_as_the_members_were_trained(self, data: Path, tmp_path: Path) -> None:
        words = ["demo", *TINY, f"data.path={data}", "train.seed=1,2", "--procs", "2", "--slurm", "--out", str(tmp_path / "out")]
        printed = run(*words)
        assert printed.exit_code == 0, printed.stderr
        assert re.search(r" sweep demo .*--procs 2 --out ", printed.stdout)

    def test_a_task_is_a_rank_of_its_member(self, data: Path, tmp_path: Path) -> None:
        entry = "import json, os, sys; json.dump([sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE']], open('told', 'w'))"
        (tmp_path / "entry.py").write_text(entry)
        (tmp_path / "job").write_text(self.script(data, tmp_path).replace(str(ENTRY), str(tmp_path / "entry.py")))
        rank = 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 "$@"'
        for name, body in {"srun": rank, "scontrol": "echo 127.0.0.1"}.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        member = make_sweep("demo", [*TINY, f"data.path={data}", "train.seed=1,2"], tmp_path / "out").members[1]

        def submit(task: int) -> int:
            environment = {**os.environ, **slurm, "SLURM_ARRAY_TASK_ID": str(task)}
            return subprocess.run(["bash", "job"], cwd=tmp_path, env=environment).returncode

        assert submit(1) == 0
        assert json.loads((tmp_path / "told").read_text()) == [member.words, "0", "1"]
        member.run.mkdir(parents=True)
        (member.run / "config.yaml").touch()
        assert submit(1) == 0
        assert json.loads((tmp_path / "told").read_text())[0] == [*member.words, "--resume"]
        assert submit(2) == 2


def test_what_a_member_is_given_is_what_train_takes() -> None:
    member = Member("a b", "demo", ("train.tokens=2e5",), Path("x y/z"))
    recipe = load_recipe(member.words[0], member.words[1:])
    assert (recipe.run.name, recipe.run.dir) == ("a b", "x y/z")
