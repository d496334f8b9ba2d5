"""Job files: what they ask of Slurm and Kubernetes, the words that reach a rank, when they resume; the Slurm one really trains."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.commands import launch
from launchers.commands.launch import TEMPLATES, render
from launchers.hosts import Host, read_hostfile
from pretrain.layout import layout_on
from pretrain.sections import LayoutSection
from tests.pretrain.tiny_run import prepare_text

KINDS = ("slurm", "k8s", "hostfile")
OVERRIDES = ["data.path=[{path: a b, weight: 1}]", "solver={method: picard}", "run.dir=runs/it's here", "train.micro_batch=8"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def directives(script: str) -> dict[str, str]:
    """The options that sbatch would read."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.partition("=")[::2] for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_printed_and_written_alike_and_never_over_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [kind, "demo", "data.path=x", "train.micro_batch=2", "--nodes", "2", "--gpus-per-node", "4"]
    printed = run(*words, "--print")
    assert printed.exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert printed.stderr == ""
    assert run(*words).exit_code == 0
    (file,) = tmp_path.iterdir()
    assert file.read_text() == printed.stdout
    assert file.name in printed.stdout
    file.write_text("mine")
    again = run(*words)
    assert again.exit_code == 2
    assert "is not overwritten" in again.stderr
    assert file.read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_illegal_layouts_are_refused_before_anything_is_rendered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TEMPLATES", Path("/nonexistent"))
    for words, said in (
        (["layout.tensor=3"], "layout.tensor may be 2 or 4"),
        (["layout.tensor=4", "--nodes", "1", "--gpus-per-node", "6"], "divide this world of 6"),
        (["layout.pipeline=2", "layout.zero=3"], "Use layout.zero=1"),
        (["--nodes", "3", "--gpus-per-node", "8"], "24 data ranks"),
        (["train.toknes=1"], "train.tokens"),
    ):
        refused = run(kind, "demo", *words, "--print")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert said in refused.stderr


def test_what_the_ranks_would_refuse_for_lack_of_data_is_said() -> None:
    result = run("slurm", "demo", "--gpus-per-node", "1", "--print")
    assert result.exit_code == 0
    assert "data.path is not set" in result.stderr


def test_examples_of_the_help_are_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        example = launch._EXAMPLE.format(kind=kind).splitlines()[2]
        assert run(*shlex.split(example)[2:]).exit_code == 0


def test_every_template_is_used() -> None:
    assert {file.name for file in TEMPLATES.iterdir()} == {"slurm.sh", "slurm-array.sh", "kubernetes.yaml", "hostfile.txt"}


class TestSlurm:
    def test_asks_for_the_machines_of_the_layout(self) -> None:
        _, script = render("slurm", "demo", [*OVERRIDES, "layout.tensor=2", "layout.pipeline=2"], 2, 4)
        asked = directives(script)
        layout = layout_on(LayoutSection(tensor=2, pipeline=2), int(asked["nodes"]) * int(asked["ntasks-per-node"]))
        assert layout.describe() in script.splitlines()[1]
        assert asked["gpus-per-node"] == asked["ntasks-per-node"] == "4"
        assert asked["signal"] == "USR1@120"
        assert {"requeue", "time", "job-name"} <= asked.keys()
        assert "partition" not in asked, "a site's own, so it stays a comment"
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0

    @pytest.fixture
    def slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of stand-ins: srun starts 2 tasks here and returns the largest code, scontrol notes what it is asked."""
        folder = tmp_path / "bin"
        folder.mkdir()
        scripts = {
            "srun": """
while [[ $1 == --* ]]; do echo "$1" >> srun.options; shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids+=($!); done
worst=0; for pid in ${pids[@]}; do wait $pid; code=$?; (( code > worst )) && worst=$code; done; exit $worst""",
            "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$@" >> scontrol.asked; fi',
        }
        for name, body in scripts.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name, value in {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": "3"}.items():
            monkeypatch.setenv(name, value)
        return tmp_path

    def submit(self, folder: Path, overrides: list[str], *arguments: str, entry: str = "", **environment: str) -> int:
        """Runs the script of `overrides` in `folder`; `entry` is the body of a stand-in for pretrain/train.py."""
        script = render("slurm", "demo", overrides, 1, 2)[1]
        if entry:
            (folder / "entry.py").write_text(entry)
            script = script.replace(str(launch.ENTRY), str(folder / "entry.py"))
        (folder / "job").write_text(script)
        return subprocess.run(["bash", "job", *arguments], cwd=folder, env={**os.environ, **environment}, timeout=120).returncode

    def test_every_task_is_a_rank_with_the_words_as_they_were_given(self, slurm: Path) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        entry = (
            f"import json, os, sys\ntold = [os.environ[n] for n in {names!r}]\njson.dump([sys.argv[1:], told], open('rank' + told[0], 'w'))"
        )
        assert self.submit(slurm, OVERRIDES, entry=entry) == 0
        for rank in "01":
            words, told = json.loads((slurm / f"rank{rank}").read_text())
            assert words == ["demo", *OVERRIDES]
            assert told == [rank, rank, "2", "2", "127.0.0.1", "24711", "3"]
        assert "--wait=120" in (slurm / "srun.options").read_text()

    def test_saved_and_stopped_means_back_into_the_queue(self, slurm: Path) -> None:
        leaves_with = "import sys; sys.exit({})"
        assert self.submit(slurm, OVERRIDES, entry=leaves_with.format(1)) == 1
        assert not (slurm / "scontrol.asked").exists()
        assert self.submit(slurm, OVERRIDES, entry=leaves_with.format(3)) == 3
        assert (slurm / "scontrol.asked").read_text() == "requeue 4711\n"

    def test_only_a_requeued_job_or_its_user_resumes(self, slurm: Path) -> None:
        entry = "import sys; sys.exit(20 + sys.argv.count('--resume'))"
        assert self.submit(slurm, OVERRIDES, entry=entry) == 20
        assert self.submit(slurm, OVERRIDES, entry=entry, SLURM_RESTART_COUNT="1") == 20, "it was stopped before the run had a folder"
        config = slurm / "runs" / "it's here" / "config.yaml"
        config.parent.mkdir(parents=True)
        config.touch()
        assert self.submit(slurm, OVERRIDES, entry=entry) == 20, "a new job must not take over a folder that happens to be there"
        assert self.submit(slurm, OVERRIDES, entry=entry, SLURM_RESTART_COUNT="1") == 21
        assert self.submit(slurm, OVERRIDES, "--resume", entry=entry) == 21

    def test_trains(self, slurm: Path) -> None:
        data = prepare_text(slurm / "text")
        small = ["model.vocabulary_size=320", "model.width=32", "model.heads=2", "model.backbone_layers=2", "evaluation.tokens=64"]
        size = ["data.sequence_length=16", "train.micro_batch=2", "train.global_batch=4", "train.tokens=128", "train.log_every=1"]
        overrides = [f"data.path={data}", "run.dir=run", "train.device=cpu", *small, *size]
        assert self.submit(slurm, overrides, SLURM_CPUS_PER_TASK="1") == 0
        assert json.loads((slurm / "run" / "summary.json").read_text())["step"] == 2


class TestKubernetes:
    @pytest.fixture
    def manifest(self) -> tuple[dict[str, Any], dict[str, Any]]:
        service, job = yaml.safe_load_all(render("k8s", "demo", ["run.name=My_Run 2", *OVERRIDES], 2, 1)[1])
        return service, job

    def test_pods_find_each_other_by_name(self, manifest: tuple[dict[str, Any], dict[str, Any]]) -> None:
        service, job = manifest
        pod = job["spec"]["template"]
        assert service["metadata"]["name"] == job["metadata"]["name"] == pod["spec"]["subdomain"] == "my-run-2"
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == pod["metadata"]["labels"]
        assert "--master-addr my-run-2-0.my-run-2 " in pod["spec"]["containers"][0]["args"][0]

    def test_a_pod_a_machine(self, manifest: tuple[dict[str, Any], dict[str, Any]]) -> None:
        spec = manifest[1]["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]

    def test_codes_that_a_new_start_would_not_mend_end_the_job(self, manifest: tuple[dict[str, Any], dict[str, Any]]) -> None:
        spec = manifest[1]["spec"]
        rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
        assert rules == {"FailJob": [2, 4], "Ignore": [3]}
        assert spec["template"]["spec"]["restartPolicy"] == "Never", "a pod failure policy asks for it"

    def test_the_command_is_one_that_attractor_train_takes(
        self, manifest: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "attractor").write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('told', 'w'))\n")
        (tmp_path / "attractor").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
        container = manifest[1]["spec"]["template"]["spec"]["containers"][0]

        def told() -> list[str]:
            assert subprocess.run([*container["command"], *container["args"]], cwd=tmp_path).returncode == 0
            return list(json.loads((tmp_path / "told").read_text()))

        place = ["--procs", "1", "--nodes", "2", "--node-rank", "1", "--master-addr", "my-run-2-0.my-run-2", "--master-port", "29500"]
        words = ["train", "demo", "run.name=My_Run 2", *OVERRIDES, *place]
        assert told() == words
        (tmp_path / "runs" / "it's here").mkdir(parents=True)
        (tmp_path / "runs" / "it's here" / "config.yaml").touch()
        assert told() == [*words, "--resume"]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "a b" in refused.stderr, "all its options were understood: it is the data that is missing"


def test_hostfile_is_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(render("hostfile", "demo", ["train.micro_batch=2"], 2, 4)[1])
    assert read_hostfile(tmp_path / "hosts") == [Host("node-1", 4), Host("node-2", 4)]
