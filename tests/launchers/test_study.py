"""`attractor study`: budgets that follow from other arms, plans, refusals, the Slurm file; and the study `mini`, run once to its report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from launchers import series
from launchers.cli import app
from launchers.study import STUDIES, load_study, study_names
from launchers.study_arms import Arms
from launchers.study_report import sentence
from model.cost import Work
from pretrain.config import load_recipe
from pretrain.errors import Refusal
from pretrain.gpus import GPUS
from pretrain.layout import layout_on
from pretrain.matching import run_flops, token_flops, work_of
from pretrain.recommend import recommend

PAIR = ("770m-vs-1.3b", "mini")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["study", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def written(folder: Path, **changes: Any) -> str:
    """The study mini with other values, as a file."""
    body = yaml.safe_load((STUDIES / "mini.yaml").read_text()) | changes
    (folder / "mine.yaml").write_text(yaml.safe_dump(body))
    return str(folder / "mine.yaml")


def finish(run: Path, arms: Arms, name: str, work: Work | None = None) -> float:
    """A run folder as a finished arm leaves it, with so much work a sequence; its model FLOPs."""
    entry = next(entry for entry in arms.resolve() if entry.name == name)
    parts = {part: entry.tokens * value for part, value in vars(token_flops(entry.recipe, work)).items()}
    hardware = sum(parts.values())
    spent = {"total": hardware, "model": hardware - parts["recomputation"], **parts}
    steps = entry.recipe.steps(entry.recipe.data.sequence_length or 0)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(entry.recipe.to_yaml())
    said = {"step": steps, "total_steps": steps, "tokens": entry.tokens, "flops": spent, "evaluation": {"step": steps}}
    (run / "summary.json").write_text(json.dumps(said))
    return spent["model"]


class TestFiles:
    def test_mini_is_the_big_study_in_other_numbers(self) -> None:
        big, mini = (load_study(name)[1] for name in PAIR)
        assert list(big.models) == list(mini.models)
        assert [(arm.name, arm.model) for arm in big.arms] == [(arm.name, arm.model) for arm in mini.arms]
        assert [arm.tokens for arm in big.arms[1:]] == [arm.tokens for arm in mini.arms[1:]], "budgets follow from each other alike"
        assert big.questions == mini.questions
        assert big.evaluation.depths == mini.evaluation.depths
        assert len(big.layouts) == len(mini.layouts)
        bodies = [yaml.safe_load((STUDIES / f"{name}.yaml").read_text()) for name in PAIR]
        assert [list(body) for body in bodies] == [list(bodies[0])] * 2
        assert [list(body["data"]) for body in bodies] == [list(bodies[0]["data"])] * 2

    def test_mini_has_the_proportions_of_the_big_one(self) -> None:
        """Fewer parameters in all, more of them in matrix products: what makes the published sentence need four numbers."""
        for name in PAIR:
            small, large = (row["parameters"] for row in json.loads(run(name, "--plan", "--json").stdout)["arms"][:2])
            assert 0.55 < small["total"] / large["total"] < 0.62
            assert 1.05 < small["matmul"] / large["matmul"] < 1.2

    @pytest.mark.parametrize("gpus", [8, 64, 256])
    def test_layouts_are_the_recommended_ones(self, gpus: int) -> None:
        study = load_study("770m-vs-1.3b")[1]
        assert set(study.layouts) == {8, 64, 256}
        for name, model in study.models.items():
            recipe = load_recipe(model.recipe)
            assert recommend(recipe, gpus, GPUS[study.gpu])[0].overrides(recipe) == study.layouts[gpus][name]
            chosen = load_recipe(model.recipe, study.layouts[gpus][name])
            assert chosen.check_world(layout_on(chosen.layout, gpus).data) >= 1

    def test_the_page_names_every_study(self) -> None:
        page = (Path(__file__).resolve().parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
        assert not [name for name in study_names() if f"`{name}`" not in page]


class TestPlan:
    def test_budgets_are_what_the_study_says(self) -> None:
        n, *arms = json.loads(run("770m-vs-1.3b", "--gpus", "64", "--plan", "--json").stdout)["arms"]
        step = 256 * 2048
        assert n["tokens"] == int(61.6e9) // step * step
        one, two, matched, back = arms
        assert (one["tokens"], two["tokens"]) == (n["tokens"], 2 * n["tokens"])
        assert matched["flops"]["model"] == pytest.approx(n["flops"]["model"], rel=1e-4)
        assert back["flops"]["model"] == pytest.approx(two["flops"]["model"], rel=1e-4)
        assert "planned FLOPs of transformer-2N, expected iterations" in back["tokens_from"]
        assert n["recipe"] == back["recipe"] == "attractor-770m"
        assert n["flops"]["model"] == pytest.approx(run_flops(load_recipe("attractor-770m"), n["tokens"]))

    def test_hours_follow_from_flops_or_from_the_modelled_step(self) -> None:
        plan = json.loads(run("770m-vs-1.3b", "--gpus", "64", "--plan", "--mfu", "0.5", "--json").stdout)
        assert plan["mfu"] == 0.5
        for row in plan["arms"]:
            assert row["gpu_hours"]["at_mfu"] == pytest.approx(row["flops"]["model"] / (0.5 * 989e12) / 3600)
            assert row["gpu_hours"]["modelled"] == pytest.approx(row["steps"] * row["step_seconds"] * 64 / 3600)
            assert row["days"]["modelled"] == pytest.approx(row["gpu_hours"]["modelled"] / 64 / 24)

    @pytest.mark.parametrize("words", [("770m-vs-1.3b", "--gpus", "64"), ("770m-vs-1.3b", "--gpus", "32"), ("mini",)], ids=" ".join)
    def test_tables_fit_80_columns_and_cut_no_word(self, words: tuple[str, ...]) -> None:
        shown = run(*words, "--plan")
        assert shown.exit_code == 0, shown.stderr
        assert max(map(len, shown.stdout.splitlines())) <= 80
        assert "…" not in shown.stdout
        assert all(arm in shown.stdout for arm in ("attractor-N", "transformer-2N", "attractor-F"))

    def test_needs_no_torch_and_touches_nothing(self, tmp_path: Path) -> None:
        code = 'import sys; sys.modules["torch"] = None; from launchers.cli import main; main()'
        words = ["study", "770m-vs-1.3b", "--gpus", "64", "--plan"]
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == []


class TestBudgets:
    def test_a_finished_arm_sets_the_budget_by_what_it_was_measured_to_spend(self, tmp_path: Path) -> None:
        study = load_study("mini")[1]
        arms = Arms(study, tmp_path, 1, [])
        planned = {entry.name: entry for entry in arms.resolve()}
        spent = finish(tmp_path / "attractor-N", arms, "attractor-N", Work(9.0, 1.0, 7.0))
        entry = {entry.name: entry for entry in arms.resolve()}["transformer-F"]
        assert entry.basis == "measured FLOPs of attractor-N"
        assert entry.tokens > planned["transformer-F"].tokens
        half_a_step = entry.recipe.train.global_batch * 128 / 2
        assert abs(entry.tokens - spent / token_flops(entry.recipe).model) <= half_a_step

    def test_iterations_come_from_a_finished_arm_of_the_same_model(self, tmp_path: Path) -> None:
        arms = Arms(load_study("mini")[1], tmp_path, 1, [])
        work = Work(9.0, 1.0, 7.0)
        finish(tmp_path / "attractor-N", arms, "attractor-N", work)
        spent = finish(tmp_path / "transformer-2N", arms, "transformer-2N")
        entry = {entry.name: entry for entry in arms.resolve()}["attractor-F"]
        assert entry.basis == "measured FLOPs of transformer-2N, measured iterations"
        assert run_flops(entry.recipe, entry.tokens, work) == pytest.approx(spent, rel=0.02)
        assert run_flops(entry.recipe, entry.tokens, work_of(entry.recipe, None)) < 0.8 * spent

    def test_what_an_arm_was_started_with_stays(self, tmp_path: Path) -> None:
        arms = Arms(load_study("mini")[1], tmp_path, 1, [])
        finish(tmp_path / "transformer-F", arms, "transformer-F")
        before = {entry.name: entry.tokens for entry in arms.resolve()}["transformer-F"]
        finish(tmp_path / "attractor-N", arms, "attractor-N", Work(9.0, 1.0, 7.0))
        after = {entry.name: entry for entry in arms.resolve()}["transformer-F"]
        assert (after.tokens, after.basis) == (before, "as it was started")

    def test_arms_come_after_what_they_follow_from(self, tmp_path: Path) -> None:
        arms = yaml.safe_load((STUDIES / "mini.yaml").read_text())["arms"]
        study = load_study(written(tmp_path, arms=arms[::-1]))[1]
        order = [arm.name for arm in study.order]
        assert all(order.index(arm.source) < order.index(arm.name) for arm in study.arms if arm.source)


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["minni"], "Did you mean `mini`"),
            (["./none.yaml"], "cannot be read"),
            (["mini", "train.tokens=1e6", "--plan"], "its arms set it"),
            (["mini", "run.dir=x", "--plan"], "--out DIR names the folder"),
            (["mini", "--gpus", "7", "--plan"], "attractor-N: No layout of"),
            (["770m-vs-1.3b", "--gpus", "509", "--plan"], "Try 256 GPUs"),
            (["770m-vs-1.3b", "--gpus", "12", "--slurm", "data.path=x"], "give 8 or 16"),
            (["770m-vs-1.3b", "--gpus", "16", "data.path=x"], "more than one machine has"),
            (["770m-vs-1.3b", "--slurm"], "data.path is missing"),
            (["770m-vs-1.3b"], "attractor data prepare hf:"),
            (["mini", "--plan", "--mfu", "40"], "between 0 and 1"),
            (["mini", "--words", "attractor-F"], "has not finished"),
            (["mini", "--words", "attractor-X"], "There is no arm attractor-X"),
        ],
    )
    def test_one_paragraph_and_nothing_touched(self, words: list[str], said: str, tmp_path: Path) -> None:
        refused = run(*words, "--out", str(tmp_path / "out"))
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert said in refused.stderr
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arm", "said"),
        [
            ({"name": "new", "model": "atractor", "tokens": 1e6}, "Did you mean attractor?"),
            ({"name": "new", "model": "attractor", "tokens": {"flops_of": "transformer-3N"}}, "Did you mean transformer-"),
            ({"name": "new", "model": "attractor", "tokens": {"flops_of": "new"}}, "new -> new"),
            ({"name": "attractor-N", "model": "attractor", "tokens": 1e6}, "two arms named attractor-N"),
            ({"name": "new", "model": "attractor", "tokens": {"half_of": "attractor-N"}}, "arms.5.tokens must be a number above 0, {times"),
            ({"name": "new", "model": "attractor", "tokens": -1}, "arms.5.tokens must be a number above 0"),
            (
                {"name": "new", "model": "attractor", "tokens": {"times": 2, "of": "transformer-F"}},
                "transformer-F, which follow from another arm",
            ),
        ],
    )
    def test_arms_that_cannot_be(self, arm: dict[str, Any], said: str, tmp_path: Path) -> None:
        arms = yaml.safe_load((STUDIES / "mini.yaml").read_text())["arms"]
        with pytest.raises(Refusal, match=re.escape(said)):
            load_study(written(tmp_path, arms=[*arms, arm]))

    def test_arms_in_a_circle(self, tmp_path: Path) -> None:
        a = {"name": "a", "model": "attractor", "tokens": {"flops_of": "b"}}
        b = {"name": "b", "model": "transformer", "tokens": {"times": 2, "of": "a"}}
        with pytest.raises(Refusal, match="a -> b -> a"):
            load_study(written(tmp_path, arms=[a, b], questions=[]))

    def test_arms_that_read_different_data(self, tmp_path: Path) -> None:
        models = yaml.safe_load((STUDIES / "mini.yaml").read_text())["models"]
        models["transformer"]["overrides"].append("data.sequence_length=64")
        refused = run(written(tmp_path, models=models), "--plan")
        assert refused.exit_code == 2
        assert "attractor-N and transformer-N differ in data.sequence_length: 128 and 64" in refused.stderr


def test_slurm_submits_matched_arms_after_what_they_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("770m-vs-1.3b", "--gpus", "64", "--slurm", "data.path=/data/edu", "--out", str(tmp_path / "out"))
    assert printed.exit_code == 0, printed.stderr
    assert "#SBATCH --nodes=8\n#SBATCH --ntasks-per-node=8" in printed.stdout
    assert printed.stdout.count("layout.zero=3 train.micro_batch=4 train.recompute=false data.path=/data/edu") == 1
    (tmp_path / "job").write_text(printed.stdout)
    count = 'echo "$@" >> submitted; wc -l < submitted'
    (tmp_path / "sbatch").write_text(f"#!/usr/bin/env bash\n{count}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert subprocess.run(["bash", "job"], cwd=tmp_path).returncode == 0
    free, transformer, attractor, table = (tmp_path / "submitted").read_text().splitlines()
    assert free == "--parsable --array=0,1,2 job"
    assert transformer == "--parsable --array=3 --dependency=afterok:1_0 job"
    assert attractor == "--parsable --array=4 --dependency=afterok:1_0:1_2 job"
    assert table.endswith("--dependency=afterok:1:2:3 job table")


def test_a_job_that_waited_asks_for_its_words() -> None:
    printed = run("mini", "--slurm", "data.path=/data/edu", "--out", "some where")
    asked = "-m launchers study mini data.path=/data/edu --gpus 1 --out 'some where' --words"
    assert re.findall(f"said=.*{asked} (.*)\\)", printed.stdout) == ["transformer-F", "attractor-F"]
    assert len(re.findall(r"^    words=\(", printed.stdout, re.MULTILINE)) == 3


class TestMini:
    """The study itself, run once."""

    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("mini") / "out"
        done = run("mini", "--out", str(folder), "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout) == json.loads((folder / "study.json").read_text())
        return folder

    pytestmark = pytest.mark.timeout(1500)

    def test_every_arm_is_whole_and_spent_what_it_was_to(self, out: Path) -> None:
        arms = json.loads((out / "study.json").read_text())["arms"]
        assert list(arms) == ["attractor-N", "transformer-N", "transformer-2N", "transformer-F", "attractor-F"]
        n = arms["attractor-N"]["tokens"]
        assert (arms["transformer-N"]["tokens"], arms["transformer-2N"]["tokens"]) == (n, 2 * n)
        for arm in arms.values():
            assert abs(arm["flops"]["difference"]) < 1e-6, "the plan's closed form at the measured work is the ledger"
            assert arm["loss"] < 6.5, "it learned something: the loss of guessing is ln 2048 = 7.6"
        assert arms["transformer-F"]["matched"]["ratio"] == pytest.approx(1, abs=0.01)
        assert arms["attractor-F"]["matched"]["ratio"] == pytest.approx(1, abs=0.05), (
            "up to how much its iterations differ from attractor-N's"
        )
        assert "measured" in arms["transformer-F"]["basis"]
        assert arms["attractor-F"]["basis"].endswith("measured iterations")

    def test_the_report_answers_every_question_with_what_is_matched(self, out: Path) -> None:
        report, text = json.loads((out / "study.json").read_text()), (out / "report.md").read_text()
        asked = [question.asks for question in load_study("mini")[1].questions]
        assert [answer["asks"] for answer in report["answers"]] == asked
        for answer in report["answers"]:
            first, second = (report["arms"][name]["loss"] for name in answer["arms"])
            assert answer["difference"] == pytest.approx(first - second, abs=2e-4)
            assert answer["low"] <= answer["difference"] <= answer["high"]
            assert answer["answer"] == ("yes" if answer["high"] < 0 else "no" if answer["low"] > 0 else "not told apart")
            assert sentence(answer, report["arms"], 0.95) in text
        published, tokens, flops, _ = report["answers"]
        assert published["matched"] == []
        assert published["ratios"]["tokens"] == 0.5
        assert tokens["matched"] == ["tokens"]
        assert flops["matched"] == ["flops"]
        for name, arm in report["arms"].items():
            counts = [f"{arm['parameters'][kind]:,}" for kind in ("total", "matmul")]
            assert f"| {name} | {' | '.join(counts)} | {arm['tokens']:,} | {arm['flops']['ledger']:.4g} | {arm['loss']:.4f} |" in text
        assert all((out / plot).stat().st_size > 0 for plot in report["plots"])
        assert all(f"]({plot})" in text for plot in report["plots"])

    def test_evaluations_are_kept_by_depth(self, out: Path) -> None:
        found = json.loads((out / "attractor-N" / "evaluation.json").read_text())
        assert list(found["loss"]) == ["0", "1", "2", "4", "8", "auto"]
        assert list(json.loads((out / "transformer-N" / "evaluation.json").read_text())["loss"]) == ["0"]

    def test_the_same_command_again_trains_nothing(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*words: Any, **more: Any) -> None:
            raise AssertionError("a process was started")

        monkeypatch.setattr(series.subprocess, "Popen", never)
        before = (out / "report.md").read_text()
        again = run("mini", "--out", str(out))
        assert again.exit_code == 0, again.stderr
        assert again.stderr.count("has finished already") == 5
        assert (out / "report.md").read_text() == before
        assert max(map(len, again.stdout.partition("\n- ")[0].splitlines())) <= 80
        other = run("mini", "--out", str(out), "train.seed=3")
        assert other.exit_code == 2
        assert "train.seed=0 (asked for: 3)" in other.stderr
