"""pretrain/train.py, the entry of every rank: arguments, environment, exit codes, and who speaks."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pretrain import train as entry
from pretrain.config import Recipe
from pretrain.errors import NON_FINITE, Refusal, RunStopped

ROOT = Path(__file__).resolve().parents[2]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Trainer(types.ModuleType):
    """Stands in for pretrain.trainer: notes what it was called with, and raises what it is told to."""

    def __init__(self) -> None:
        super().__init__("pretrain.trainer")
        self.calls: list[tuple[Recipe, bool]] = []
        self.error: BaseException | None = None

    def train(self, recipe: Recipe, resume: bool) -> None:
        self.calls.append((recipe, resume))
        if self.error is not None:
            raise self.error


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES})
    monkeypatch.setattr(entry, "_OTHERS_WAIT", 0.0)
    stand_in = Trainer()
    monkeypatch.setitem(sys.modules, "pretrain.trainer", stand_in)
    return stand_in


def test_alone_it_is_a_run_of_one(trainer: Trainer) -> None:
    assert entry.main(["demo", "train.seed=5"]) == 0
    recipe, resume = trainer.calls[0]
    assert (recipe.train.seed, resume) == (5, False)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1", "1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_arguments_of_the_deepspeed_launcher(trainer: Trainer) -> None:
    os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="node", MASTER_PORT="1234")
    assert entry.main(["--local_rank=1", "demo", "train.seed=5", "--resume", "train.log_every=1"]) == 0
    recipe, resume = trainer.calls[0]
    assert (recipe.train.seed, recipe.train.log_every, resume) == (5, 1, True)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("1", "2", "node")


def test_refusals_exit_with_2(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["demo", "train.toknes=5"]) == 2
    assert not trainer.calls
    trainer.error = Refusal("The data is not there.")
    assert entry.main(["demo"]) == 2
    said = capsys.readouterr()
    assert "Did you mean `train.tokens`?" in said.err
    assert "error: The data is not there." in said.err
    assert said.out == ""


def test_stopped_runs_exit_with_their_code(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.error = RunStopped("Ten steps were not finite.", NON_FINITE)
    assert entry.main(["demo"]) == NON_FINITE
    assert capsys.readouterr().err == "Ten steps were not finite.\n"
    os.environ["RANK"] = "1"
    assert entry.main(["demo"]) == NON_FINITE
    assert capsys.readouterr().err == ""


def test_interrupts_exit_with_130_and_no_words(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.error = KeyboardInterrupt()
    assert entry.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_bugs_keep_their_traceback(trainer: Trainer) -> None:
    trainer.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        entry.main(["demo"])


def test_other_ranks_speak_only_when_rank_0_did_not_end_them(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(RANK="3", WORLD_SIZE="4")
    waited: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    monkeypatch.setattr(entry.signal, "signal", lambda number, handler: None)
    trainer.error = Refusal("Shard 7 is damaged.")
    assert entry.main(["demo"]) == 2
    assert waited == [entry._OTHERS_WAIT]
    assert capsys.readouterr().err == "rank 3: error: Shard 7 is damaged.\n"


def test_as_a_file_from_anywhere(tmp_path: Path) -> None:
    """`python pretrain/train.py` finds its rooms from any folder, without shadowing other modules by its own."""
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), "no-such-recipe"]
    clean = {name: value for name, value in os.environ.items() if name not in (*RANK_VARIABLES, "PYTHONPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no recipe named `no-such-recipe`.")
    assert done.stdout == ""
