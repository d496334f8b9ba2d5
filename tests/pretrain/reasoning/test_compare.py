"""Comparisons of puzzle runs whose accuracies and costs are known: every figure, what makes an arm, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from pretrain.errors import Refusal
from pretrain.reasoning import compare
from pretrain.reasoning.compare import compare_puzzle_runs
from pretrain.reasoning.compare_arms import make_arms
from pretrain.reasoning.compare_plots import over_seeds
from pretrain.reasoning.compare_records import are_puzzles, read_puzzle_run
from tests.pretrain.reasoning.puzzle_folders import write_puzzle_manifest, write_puzzle_run
from tests.pretrain.run_folders import write_manifest, write_run

TOPS = (0.6, 0.7, 0.8)


def rising(top: float) -> Callable[[int], float]:
    """From 0 to `top` at step 80, and a little less at the end."""
    return lambda step: top * min(1.0, step / 80) - (0.05 if step == 100 else 0.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_puzzle_manifest(tmp_path / "prepared")


@pytest.fixture
def runs(tmp_path: Path, data: Path) -> list[Path]:
    """Three seeds of a TRM, two of an Attractor that costs twice as much and is solved in 3 and 4 iterations."""
    made = [
        write_puzzle_run(tmp_path / f"trm/seed={seed}", data, rising(top), [f"train.seed={seed}"], seconds_a_step=1.0 + seed)
        for seed, top in enumerate(TOPS)
    ]
    solved = ["model.kind=attractor", "gradient.mode=phantom", "gradient.steps=2", "model.width=48"]
    for seed, top in ((0, 0.9), (7, 0.4)):
        words = [*solved, f"train.seed={seed}"]
        made.append(
            write_puzzle_run(tmp_path / f"attractor/seed={seed}", data, rising(top), words, flops_a_step=2e6, iterations=3.0 + (seed > 0))
        )
    return made


@pytest.fixture
def _unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out, which take most of a comparison's time."""
    monkeypatch.setattr(compare, "plot_puzzles", lambda *_: [])


def spread_of(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "sd": stdev(values), "low": min(values), "high": max(values), "n": len(values)}


@pytest.mark.usefixtures("_unplotted")
class TestFigures:
    def test_accuracies_are_means_over_seeds_at_the_last_supervision_step(self, runs: list[Path], tmp_path: Path) -> None:
        trm, attractor = compare_puzzle_runs(runs, tmp_path / "out")["arms"]
        exact = [top - 0.05 for top in TOPS]
        assert trm["seeds"] == [0, 1, 2]
        assert trm["exact"] == pytest.approx(spread_of(exact))
        assert trm["cells"] == pytest.approx(spread_of([(1 + share) / 2 for share in exact]))
        assert trm["by_step"]["1"] == pytest.approx(spread_of([share / 2 for share in exact]))
        assert trm["best"] == pytest.approx(spread_of(list(TOPS)))
        assert trm["valid"] is None
        assert attractor["exact"]["mean"] == pytest.approx(0.6)
        assert attractor["iterations"]["evaluation"] == pytest.approx(spread_of([3.0, 4.0]))
        assert attractor["iterations"]["training"]["mean"] == pytest.approx(3.5)
        assert trm["iterations"] == {"evaluation": None, "training": None}

    def test_costs_are_those_of_the_last_record(self, runs: list[Path], tmp_path: Path) -> None:
        trm, attractor = compare_puzzle_runs(runs, tmp_path / "out")["arms"]
        assert (trm["step"]["mean"], trm["puzzle_steps"]["mean"], trm["tokens"]["mean"]) == (100, 800, 12800)
        assert trm["flops"]["hardware"]["mean"] == pytest.approx(1e8)
        assert trm["flops"]["model"]["mean"] == pytest.approx(0.9e8)
        assert trm["seconds"] == pytest.approx(spread_of([100.0, 200.0, 300.0]))
        assert attractor["flops"]["model"]["mean"] == pytest.approx(1.8e8)
        assert attractor["parameters"]["matmul"] == 2 * (4 * 48**2 + 3 * 48 * 48)
        assert trm["parameters"]["matmul"] == 2 * (4 * 32**2 + 3 * 32 * 48)

    def test_steps_to_an_accuracy(self, runs: list[Path], tmp_path: Path) -> None:
        """0.6, 0.7 and 0.8 times t / 80 come to 0.5 at 67, 57 and 50 steps: seen at the evaluations of 70, 60 and 50."""
        document = compare_puzzle_runs(runs, tmp_path / "out")
        trm, attractor = document["arms"]
        assert trm["reached"]["runs"] == 3
        assert trm["reached"]["step"] == pytest.approx(spread_of([70, 60, 50]))
        assert trm["reached"]["flops"] == pytest.approx(spread_of([70e6, 60e6, 50e6]))
        assert trm["reached"]["seconds"] == pytest.approx(spread_of([70.0, 120.0, 150.0]))
        assert (attractor["reached"]["runs"], attractor["reached"]["step"]["mean"]) == (1, 50)
        never = compare_puzzle_runs(runs, tmp_path / "out", accuracy=0.95)["arms"]
        assert [arm["reached"] for arm in never] == [{"runs": 0, "step": None, "flops": None, "seconds": None}] * 2
        assert "| attractor | 2 | 60.0 ± 35.4 |" in (tmp_path / "out" / "compare.md").read_text()

    def test_what_is_matched_and_what_is_not(self, runs: list[Path], tmp_path: Path) -> None:
        document = compare_puzzle_runs(runs, tmp_path / "out")
        (pair,) = document["matched"]
        assert pair["quantities"]["puzzle steps"] == {"ratio": 1.0, "matched": True}
        assert pair["quantities"]["model FLOPs"] == {"ratio": pytest.approx(2.0), "matched": False}
        assert pair["difference"] == pytest.approx(0.6 - 0.65)
        said = " ".join(document["findings"])
        assert (
            "attractor less that of trm: -5.0 points (60.0 ± 35.4 % over 2 seeds, 65.0 ± 10.0 % over 3 seeds). Their seeds overlap." in said
        )
        assert "matched within 1%: puzzle steps; not matched:" in said
        assert "Accuracies are of 400 of the 500 validation puzzles (sudoku 4 x 4)" in said
        assert "standard error of up to 2.4 points" in said

    def test_an_unfinished_run_and_a_single_seed_are_said(self, tmp_path: Path, data: Path) -> None:
        whole = write_puzzle_run(tmp_path / "whole", data, rising(0.5))
        part = write_puzzle_run(tmp_path / "part", data, rising(0.5), ["optimizer.lr=1e-3"], reached=60)
        document = compare_puzzle_runs([whole, part], tmp_path / "out")
        assert [arm["unfinished"] for arm in document["arms"]] == [0, 1]
        assert document["arms"][1]["exact"] == {"mean": pytest.approx(0.375), "sd": None, "low": 0.375, "high": 0.375, "n": 1}
        said = " ".join(document["findings"])
        assert "One seed: whole, part." in said
        assert "Runs of part are unfinished" in said
        assert "| part (1 unfinished) | 1 | 37.5 | 68.8 |" in (tmp_path / "out" / "compare.md").read_text()

    def test_no_puzzle_solved_is_no_certainty(self, tmp_path: Path, data: Path) -> None:
        made = [write_puzzle_run(tmp_path / f"s{seed}", data, lambda _: 0.0, [f"train.seed={seed}"]) for seed in (0, 1)]
        (said,) = compare_puzzle_runs(made, tmp_path / "out")["findings"]
        assert "by up to 0.8 points (95 %, where none or all of 400 are solved)" in said

    def test_mazes_are_valid_too(self, tmp_path: Path) -> None:
        mazes = write_puzzle_manifest(tmp_path / "mazes", game="maze")
        made = [write_puzzle_run(tmp_path / f"s{seed}", mazes, rising(0.5), [f"train.seed={seed}"], valid=True) for seed in (0, 1)]
        (arm,) = compare_puzzle_runs(made, tmp_path / "out")["arms"]
        assert arm["valid"]["mean"] == pytest.approx(0.55)
        assert "| cells | valid | best |" in (tmp_path / "out" / "compare.md").read_text()


class TestArms:
    def test_what_makes_no_other_arm(self, tmp_path: Path, data: Path) -> None:
        """Seeds, where a run is, how fast it runs, and the same puzzles elsewhere."""
        twin = write_puzzle_manifest(tmp_path / "twin")
        words = ["train.seed=1", "train.micro_batch=8", "checkpoint.every=7", "layout.zero=0", "train.log_every=2"]
        made = [write_puzzle_run(tmp_path / "tiny-s0", data, rising(0.5)), write_puzzle_run(tmp_path / "tiny-s1", twin, rising(0.5), words)]
        (arm,) = make_arms([read_puzzle_run(path, path.name) for path in made])
        assert (arm.name, arm.seeds) == ("tiny", [0, 1])

    def test_other_training_puzzles_make_one(self, tmp_path: Path, data: Path) -> None:
        other = write_puzzle_manifest(tmp_path / "other", training="c" * 64)
        made = [write_puzzle_run(tmp_path / "a", data, rising(0.5)), write_puzzle_run(tmp_path / "b", other, rising(0.5))]
        assert [arm.name for arm in make_arms([read_puzzle_run(path, path.name) for path in made])] == ["a", "b"]

    def test_names_without_seeds_or_by_what_differs(self, tmp_path: Path, data: Path) -> None:
        def named(*folders: tuple[str, list[str]]) -> list[str]:
            paths = [tmp_path / folder for folder, _ in folders]
            for path, (_, words) in zip(paths, folders, strict=True):
                if not path.exists():
                    write_puzzle_run(path, data, rising(0.5), words)
            return [arm.name for arm in make_arms([read_puzzle_run(path, path.name) for path in paths])]

        wide = ["model.width=64"]
        assert named(("x/seed=0,width=32", []), ("x/seed=0,width=64", wide)) == ["width=32", "width=64"]
        assert named(("small/seed=0", []), ("large/seed=0", wide)) == ["small", "large"]
        assert named(("one/a", []), ("two/b", ["train.seed=1"]), ("three/c", wide)) == ["width=32", "width=64"]

    def test_the_same_seed_twice_is_refused(self, tmp_path: Path, data: Path) -> None:
        made = [write_puzzle_run(tmp_path / name, data, rising(0.5)) for name in "ab"]
        with pytest.raises(Refusal, match=r"the same run twice: same settings, same train\.seed=0"):
            compare_puzzle_runs(made, tmp_path / "out")


class TestRefused:
    def refused(self, runs: list[Path], out: Path, said: str, **more: float) -> None:
        with pytest.raises(Refusal, match=re.escape(said)) as caught:
            compare_puzzle_runs(runs, out, **more)
        assert "\n" not in str(caught.value)
        assert not out.is_dir()

    def test_other_puzzles(self, tmp_path: Path, data: Path) -> None:
        first = write_puzzle_run(tmp_path / "first", data, rising(0.5))
        mazes = write_puzzle_run(tmp_path / "mazes", write_puzzle_manifest(tmp_path / "m", game="maze"), rising(0.5))
        other = write_puzzle_run(tmp_path / "other", write_puzzle_manifest(tmp_path / "o", validation="c" * 64), rising(0.5))
        fewer = write_puzzle_run(tmp_path / "fewer", data, rising(0.5), puzzles=100)
        self.refused([first, mazes], tmp_path / "out", "different games (sudoku 4 x 4 and maze 4 x 4)")
        self.refused([first, other], tmp_path / "out", "different validation sets (aaaaaaaaaaaa and cccccccccccc)")
        self.refused([first, fewer], tmp_path / "out", "different numbers of validation puzzles (400 and 100)")

    def test_what_is_no_comparison(self, tmp_path: Path, data: Path) -> None:
        first = write_puzzle_run(tmp_path / "first", data, rising(0.5))
        early = write_puzzle_run(tmp_path / "early", data, rising(0.5), ["train.seed=1"], reached=8)
        self.refused([first], tmp_path / "out", "at least two runs, not 1")
        self.refused([first, first], tmp_path / "out", "is given twice")
        self.refused([first, early], tmp_path / "out", "has not been evaluated yet")
        self.refused([first, early], tmp_path / "out", "--accuracy 50 is a share", accuracy=50.0)
        (data / "manifest.json").unlink()
        self.refused([first, early], tmp_path / "out", "was validated on cannot be told")

    def test_puzzles_among_language_models(self, tmp_path: Path, data: Path) -> None:
        puzzles = write_puzzle_run(tmp_path / "puzzles", data, rising(0.5))
        text = write_run(tmp_path / "text", write_manifest(tmp_path / "prepared-text"), lambda _: 5.0)
        assert are_puzzles([puzzles])
        assert not are_puzzles([text])
        with pytest.raises(Refusal, match=f"{puzzles} is a run on puzzles, and {text} one of a language model"):
            are_puzzles([text, puzzles])
        with pytest.raises(Refusal, match="There is no run in"):
            are_puzzles([tmp_path / "nowhere"])


class TestPlots:
    def test_curves_are_of_the_evaluations_that_all_seeds_have(self, tmp_path: Path, data: Path) -> None:
        made = [
            write_puzzle_run(tmp_path / f"x/seed={seed}", data, rising(top), [f"train.seed={seed}"], reached=end, seconds_a_step=seconds)
            for seed, top, end, seconds in ((0, 0.4, 100, 1.0), (1, 0.8, 60, 3.0))
        ]
        (arm,) = make_arms([read_puzzle_run(path, path.name) for path in made])
        found = over_seeds(arm)
        assert found["steps"].tolist() == [10, 20, 30, 40, 50, 60]
        assert found["exact"].shape == (2, 6)
        assert found["exact"][:, -1] == pytest.approx([0.3, 0.6])
        assert found["seconds"] == pytest.approx(2.0 * found["steps"])
        assert found["flops"] == pytest.approx(1e6 * found["steps"])

    def test_drawn_where_there_is_something_to_show(self, runs: list[Path], tmp_path: Path) -> None:
        document = compare_puzzle_runs(runs, tmp_path / "out")
        assert document["plots"] == ["accuracy.png", "sizes.png"]
        assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in document["plots"])
        assert json.loads((tmp_path / "out" / "compare.json").read_text()) == document
        again = compare_puzzle_runs(runs[:3], tmp_path / "out")
        assert again["plots"] == ["accuracy.png"], "one size"
        assert not (tmp_path / "out" / "sizes.png").exists()
