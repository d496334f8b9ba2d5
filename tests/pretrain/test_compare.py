"""Comparisons of run folders made by hand: every figure is known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import compare
from pretrain.compare import compare_runs
from pretrain.errors import Refusal
from tests.distributed.ranks import ROOT
from tests.pretrain.run_folders import STEP_TOKENS, write_lines, write_manifest, write_run

PNG = b"\x89PNG\r\n\x1a\n"
DEPTHS = ("0", "1", "2", "4", "auto")
TOTAL = 100 * STEP_TOKENS


def line(start: float, end: float) -> Callable[[float], float]:
    """A loss that falls straight from `start` at 0 tokens to `end` at the last of 100 steps."""
    return lambda tokens: start + (end - start) * tokens / TOTAL


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "prepared")


@pytest.fixture
def pair(tmp_path: Path, prepared: Path) -> list[Path]:
    """A Transformer from 6 to 4 nats and an Attractor from 6 to 3, at twice the FLOPs a token and thrice the seconds a step."""
    first = write_run(tmp_path / "runs" / "plain", prepared, line(6.0, 4.0))
    second = write_run(tmp_path / "runs" / "deep", prepared, line(6.0, 3.0), depths=DEPTHS, flops_a_token=20.0, seconds_a_step=1.5, every=2)
    return [first, second]


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out, which take most of a comparison's time."""
    monkeypatch.setattr(compare, "plot_comparison", lambda *_: [])


def compared(runs: list[Path], out: Path) -> dict[str, Any]:
    return compare_runs(runs, out, evaluate=False)


def cross(document: dict[str, Any], curve: str, run: str, reaches: str) -> dict[str, Any]:
    (found,) = (pair for pair in document["crossings"] if (pair["curve"], pair["run"], pair["reaches"]) == (curve, run, reaches))
    return found


@pytest.mark.usefixtures("unplotted")
class TestCrossings:
    def test_validation_losses_cross_where_they_must(self, pair: list[Path], tmp_path: Path) -> None:
        document = compared(pair, tmp_path / "out")
        found = cross(document, "validation", "deep", "plain")
        assert found["loss"] == pytest.approx(4.0, rel=1e-12)
        assert found["tokens"] == pytest.approx(TOTAL * 2 / 3, rel=1e-9), "6 - 3 t = 4, between the records at 60 % and 70 %"
        assert found["flops"] == pytest.approx(20 * TOTAL * 2 / 3, rel=1e-9)
        assert found["seconds"] == pytest.approx(100.0, rel=1e-9)
        assert found["ratios"] == pytest.approx({"tokens": 2 / 3, "flops": 4 / 3, "seconds": 2.0}, rel=1e-9)
        assert cross(document, "validation", "plain", "deep")["reached"] is False

    def test_smoothed_training_losses_cross_where_they_must(self, pair: list[Path], tmp_path: Path) -> None:
        document = compared(pair, tmp_path / "out")
        window = document["smoothing"]["window_tokens"]
        assert window == TOTAL / 5, "ten records of `deep`, which records every second step"
        assert document["smoothing"]["records"] == {"plain": 20, "deep": 10}
        last = document["runs"][0]["training"]["smoothed"]
        assert last == pytest.approx(line(6.0, 4.0)(TOTAL - 9.5 * STEP_TOKENS), rel=1e-12), "a mean over steps 81 to 100"
        found = cross(document, "training", "deep", "plain")
        lag = 9 * STEP_TOKENS  # of a mean over ten records two steps apart
        assert found["tokens"] == pytest.approx((6.0 - last) / 3.0 * TOTAL + lag, rel=1e-9)

    def test_costs_at_a_validation_between_two_records(self, tmp_path: Path, prepared: Path) -> None:
        """Evaluated every 10 steps, recorded every 7: the last evaluation at step 100 lies beyond the last record, at 98."""
        runs = [write_run(tmp_path / name, prepared, line(6.0, 4.0), every=7) for name in ("a", "b")]
        document = compared(runs, tmp_path / "out")
        found = cross(document, "validation", "a", "b")
        assert found["tokens"] == pytest.approx(TOTAL, rel=1e-9)
        assert found["flops"] == pytest.approx(10 * TOTAL, rel=1e-9)
        assert found["seconds"] == pytest.approx(50.0, rel=1e-9)
        assert document["runs"][0]["seconds"] == pytest.approx(49.0, rel=1e-9)


@pytest.mark.usefixtures("unplotted")
class TestMatched:
    def test_what_is_matched_is_said_and_what_is_not(self, pair: list[Path], tmp_path: Path) -> None:
        document = compared(pair, tmp_path / "out")
        ((said, quantities),) = (
            (said, document["matched"][0]["quantities"]) for said in document["findings"] if said.startswith("deep against plain: ")
        )
        assert quantities["tokens"] == {"ratio": 1.0, "matched": True}
        assert quantities["hardware FLOPs"] == {"ratio": 2.0, "matched": False}
        assert not quantities["matmul parameters"]["matched"], "one block more, in the attractor"
        matched, unmatched = said.split("; not matched: ")
        assert matched.endswith("matched within 1%: tokens")
        for name in ("total parameters", "matmul parameters", "hardware FLOPs (2.000 times)", "model FLOPs (2.000 times)"):
            assert name in unmatched
        report = (tmp_path / "out" / "compare.md").read_text()
        assert "| tokens | 1 | 1.000 matched |" in report
        assert "| hardware FLOPs | 1 | 2.000 not |" in report

    @pytest.mark.parametrize(("flops", "matched"), [(10.09, True), (10.11, False), (9.91, True), (9.89, False)])
    def test_within_one_per_cent(self, tmp_path: Path, prepared: Path, flops: float, matched: bool) -> None:
        runs = [write_run(tmp_path / "a", prepared, line(6, 4)), write_run(tmp_path / "b", prepared, line(6, 4), flops_a_token=flops)]
        quantities = compared(runs, tmp_path / "out")["matched"][0]["quantities"]
        assert {name for name, found in quantities.items() if not found["matched"]} == (
            set() if matched else {"hardware FLOPs", "model FLOPs"}
        )


class TestReport:
    def test_writes_what_it_returns_with_its_pictures(self, pair: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "new" / "out"
        document = compared(pair, out)
        assert json.loads((out / "compare.json").read_text()) == document
        assert document["plots"] == ["loss.png", "depth.png", "iterations.png"]
        report = (out / "compare.md").read_text()
        for name in document["plots"]:
            assert (out / name).read_bytes().startswith(PNG)
            assert f"]({name})" in report
        deep = document["runs"][1]
        assert deep["validation"]["by_depth"] == pytest.approx({"0": 3.4, "1": 3.3, "2": 3.2, "4": 3.1, "auto": 3.0})
        assert (deep["validation"]["depth"], deep["validation"]["loss"]) == ("auto", pytest.approx(3.0))
        assert any("+0.4000 nats at T = 0 and +0.3000 nats at T = 1" in said for said in document["findings"])
        assert deep["solver_iterations"] == {"first": 3.0, "last": 3.0}
        assert deep["flops"] == pytest.approx({"hardware": 20 * TOTAL, "model": 18 * TOTAL})
        assert deep["layout"]["data"] == 2
        assert document["documents"] is None
        assert "whole validation split" not in report

    def test_runs_that_solve_nothing_leave_no_older_pictures(self, pair: list[Path], tmp_path: Path, prepared: Path) -> None:
        compared(pair, tmp_path / "out")
        other = write_run(tmp_path / "other", prepared, line(6.0, 4.5))
        assert compared([pair[0], other], tmp_path / "out")["plots"] == ["loss.png"]
        assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["loss.png"]

    @pytest.mark.usefixtures("unplotted")
    def test_a_killed_run_is_labelled_and_compared_at_what_it_reached(self, pair: list[Path], tmp_path: Path, prepared: Path) -> None:
        killed = write_run(tmp_path / "killed", prepared, line(6.0, 4.0), reached=45, summary=False)
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 46, "tok')
        document = compared([pair[0], killed], tmp_path / "out")
        run = document["runs"][1]
        assert (run["step"], run["total_steps"], run["finished"], run["tokens"]) == (45, 100, False, 45 * STEP_TOKENS)
        assert (run["validation"]["step"], run["validation"]["loss"]) == (40, pytest.approx(5.2))
        assert run["flops"] == pytest.approx({"hardware": 450 * STEP_TOKENS, "model": 405 * STEP_TOKENS})
        assert run["layout"]["data"] is None
        assert any(said.startswith("killed is unfinished: it stands at step 45 of 100") for said in document["findings"])
        assert "killed (unfinished)" in (tmp_path / "out" / "compare.md").read_text().splitlines()[0]
        assert cross(document, "validation", "plain", "killed")["tokens"] == pytest.approx(40 * STEP_TOKENS)

    def test_a_run_without_an_evaluation_yet(self, pair: list[Path], tmp_path: Path, prepared: Path) -> None:
        new = write_run(tmp_path / "new", prepared, lambda tokens: None if tokens < 3 * STEP_TOKENS else 5.0, reached=5, evaluations=0)
        document = compared([pair[0], new], tmp_path / "out")
        assert document["runs"][1]["validation"] is None
        assert {pair["curve"] for pair in document["crossings"]} == {"training"}
        assert "new has no validation loss on record yet." in document["findings"]

    @pytest.mark.usefixtures("unplotted")
    def test_names(self, tmp_path: Path, prepared: Path) -> None:
        runs = [write_run(tmp_path / side / "demo", prepared, line(6.0, 4.0)) for side in ("left", "right")]
        assert [run["name"] for run in compared(runs, tmp_path / "out")["runs"]] == ["left/demo", "right/demo"]
        named = compare_runs(runs, tmp_path / "out", evaluate=False, names=["A", "B"])
        assert [pair["run"] for pair in named["matched"]] == ["B"]

    @pytest.mark.usefixtures("unplotted")
    def test_equal_data_may_lie_in_two_places(self, tmp_path: Path, prepared: Path) -> None:
        other = write_manifest(tmp_path / "copy")
        runs = [write_run(tmp_path / str(number), data, line(6.0, 4.0)) for number, data in enumerate((prepared, other))]
        assert len(compared(runs, tmp_path / "out")["runs"]) == 2

    def test_without_torch(self, pair: list[Path], tmp_path: Path) -> None:
        code = f"""
import sys
sys.modules["torch"] = None  # importing it now raises
from pathlib import Path
from pretrain.compare import compare_runs
compare_runs([Path({str(pair[0])!r}), Path({str(pair[1])!r})], Path({str(tmp_path / "out")!r}), evaluate=False)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestRefusals:
    @pytest.fixture
    def first(self, tmp_path: Path, prepared: Path) -> Path:
        return write_run(tmp_path / "first", prepared, line(6.0, 4.0))

    def refused(self, runs: list[Path], tmp_path: Path, match: str, **options: Any) -> None:
        with pytest.raises(Refusal, match=match):
            compare_runs(runs, tmp_path / "out", **{"evaluate": False, **options})
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"fingerprint": "e" * 64}, "different tokenizers"),
            ({"sequence_length": 32}, "different sequence lengths"),
            ({"validation": "b" * 64}, "different validation data"),
        ],
    )
    def test_other_data(self, first: Path, tmp_path: Path, change: dict[str, Any], match: str) -> None:
        other = write_run(tmp_path / "other", write_manifest(tmp_path / "elsewhere", **change), line(6.0, 4.0), steps=200)
        self.refused([first, other], tmp_path, match)

    def test_another_part_of_the_validation_split(self, first: Path, tmp_path: Path, prepared: Path) -> None:
        self.refused([first, write_run(tmp_path / "other", prepared, line(6.0, 4.0), predicted=80)], tmp_path, "different parts")

    def test_no_run_there(self, first: Path, tmp_path: Path) -> None:
        self.refused([first, tmp_path / "frist"], tmp_path, "Did you mean .*first")
        self.refused([first, tmp_path], tmp_path, "no config.yaml")

    def test_no_record(self, first: Path, tmp_path: Path, prepared: Path) -> None:
        empty = write_run(tmp_path / "empty", prepared, line(6.0, 4.0))
        write_lines(empty / "metrics.jsonl", [])
        self.refused([first, empty], tmp_path, "no record of a loss")
        (empty / "metrics.jsonl").unlink()
        self.refused([first, empty], tmp_path, "no record of a loss")

    def test_a_damaged_record(self, first: Path, tmp_path: Path, prepared: Path) -> None:
        damaged = write_run(tmp_path / "damaged", prepared, line(6.0, 4.0))
        lines = (damaged / "metrics.jsonl").read_text().splitlines()
        (damaged / "metrics.jsonl").write_text("\n".join([lines[0][:20], *lines[1:]]) + "\n")
        self.refused([first, damaged], tmp_path, "not JSON")

    def test_too_few_or_twice_the_same(self, first: Path, tmp_path: Path) -> None:
        self.refused([first], tmp_path, "at least two runs, not 1")
        self.refused([first, first.parent / "." / first.name], tmp_path, "given twice")

    def test_names_that_do_not_tell_runs_apart(self, pair: list[Path], tmp_path: Path) -> None:
        self.refused(pair, tmp_path, "as many names", names=["one"])
        self.refused(pair, tmp_path, "as many names", names=["one", "one"])

    def test_data_that_has_gone(self, pair: list[Path], tmp_path: Path, prepared: Path) -> None:
        (prepared / "manifest.json").unlink()
        self.refused(pair, tmp_path, "What the run .*plain was validated on cannot be told")

    def test_no_checkpoint_to_evaluate(self, pair: list[Path], tmp_path: Path) -> None:
        self.refused(pair, tmp_path, "--no-evaluate", evaluate=True)

    def test_out_is_a_file(self, pair: list[Path], tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(Refusal, match="is a file"):
            compare_runs(pair, tmp_path / "taken", evaluate=False)
        assert (tmp_path / "taken").read_text() == "mine"
