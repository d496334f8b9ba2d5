"""`attractor checkpoint`: what is listed, what exit code 2 says, and a conversion whose last line can be pasted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.commands.checkpoint import parse_layout
from pretrain.bench_checkpoint import synthesise
from pretrain.config import load_recipe
from pretrain.errors import Refusal
from pretrain.loaded import recipe_of

SMALL = ["model.width=16", "model.heads=2", "model.backbone_layers=2", "model.vocabulary_size=64", "data.sequence_length=16"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with one checkpoint, of step 1000, of two data ranks under ZeRO 1, and its record."""
    recipe = load_recipe("demo", [*SMALL, "train.micro_batch=2", "train.global_batch=4", "data.path=nowhere"])
    synthesise(recipe, tmp_path / "run", 2)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 999, "loss": 9.0}\n{"step": 1000, "loss": 3.25}\n{"step": 10')
    (tmp_path / "run" / "evaluations.jsonl").write_text('{"step": 1000, "loss": {"0": 4.0, "auto": 3.5}}\n')
    return tmp_path / "run"


def damage(trained: Path) -> None:
    file = next((trained / "checkpoints").glob("*/zero_pp_rank_1*"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def test_ls_lists_steps_with_layout_tokens_and_losses(trained: Path) -> None:
    (trained / "checkpoints" / ".step-00002000.partial").mkdir()
    found = json.loads(run("ls", str(trained), "--json").stdout)
    (row,) = found["checkpoints"]
    assert (row["step"], row["latest"], row["whole"], row["loss"], row["validation"]) == (1000, True, True, 3.25, 3.5)
    assert row["layout"] == {"world_size": 2, "pipeline": 1, "data": 2, "tensor": 1, "zero": 1}
    assert row["bytes"] == sum(file.stat().st_size for file in (trained / "checkpoints" / "step-00001000").iterdir())
    shown = run("ls", str(trained)).stdout
    for word in ("1000", "dp2, ZeRO 1", "3.2500", "3.5000", "latest", ".step-00002000.partial was left"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_ls_says_what_is_not_whole(trained: Path) -> None:
    next((trained / "checkpoints").glob("*/zero_pp_rank_1*")).unlink()
    (row,) = json.loads(run("ls", str(trained), "--json").stdout)["checkpoints"]
    assert not row["whole"]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read" in row["fault"]
    shown = " ".join(run("ls", str(trained)).stdout.split())
    assert "latest, not whole" in shown
    assert "Step 1000 is not whole: zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read" in shown


def test_ls_bears_odd_records_and_files(trained: Path) -> None:
    (trained / "metrics.jsonl").write_text('[1]\n{"a": 1}\n{"step": 1000, "loss": NaN}\n{"step": "x", "loss": 1}')
    (trained / "evaluations.jsonl").write_text('{"step": 1000, "loss": {}}\n')
    (trained / "checkpoints" / "step-00002000").write_text("a file")
    (trained / "checkpoints" / "latest").unlink()
    (row,) = json.loads(run("ls", str(trained), "--json").stdout)["checkpoints"]
    assert (row["step"], row["latest"], row["loss"], row["validation"]) == (1000, False, None, None)
    assert "--resume takes the newest whole one" in run("ls", str(trained)).stdout


def test_verify_hashes_every_file(trained: Path) -> None:
    (row,) = json.loads(run("verify", str(trained), "--json").stdout)["checkpoints"]
    assert (row["step"], row["files"]) == (1000, 6)
    assert "step 1000: whole, 6 files" in run("verify", str(trained), "--step", "1000").stdout
    damage(trained)
    ended = run("verify", str(trained), "--json")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt does not match its sha256" in ended.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "RUN", "--step", "7"], "has no checkpoint of step 7. It has the steps 1000"),
        (["ls", "ELSEWHERE"], "There are no checkpoints in"),
        (["convert", "ELSEWHERE", "--layout", "tensor=1"], "There is no run in"),
        (["convert", "RUN", "--layout", "tensor=two"], "`tensor=two` in --layout tensor=two is no part of a layout"),
        (["convert", "RUN", "--layout", "tensor=1", "--out", "RUN"], "already holds a run"),
        (["convert", "RUN", "--layout", "tensor=1", "--out", "RUN*"], "DeepSpeed reads as a pattern"),
    ],
)
def test_refusals_are_one_paragraph(trained: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    places = {"RUN": str(trained), "RUN*": f"{trained}*", "ELSEWHERE": str(tmp_path / "elsewhere")}
    ended = run(*(places.get(word, word) for word in arguments))
    assert ended.exit_code == 2
    assert said in ended.stderr.replace("\n", " ")
    assert ended.stdout == ""


def test_convert_says_how_to_go_on(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    ended = run("convert", str(trained), "--layout", "tensor=2,data=2", "--out", str(out))
    assert ended.exit_code == 0, ended.stderr
    assert f"attractor train {out}/config.yaml --procs 4 --resume" in ended.stdout
    assert recipe_of(out).layout.tensor == 2
    (row,) = json.loads(run("ls", str(out), "--json").stdout)["checkpoints"]
    assert (row["layout"], row["loss"]) == ({}, 3.25)
    report = json.loads(run("convert", str(trained), "--layout", "zero=3", "--json").stdout)
    assert (report["run"], report["step"], report["ranks"]) == (str(trained), 1000, 1)


@pytest.mark.parametrize("text", ["", "tensor", "tensor=0", "tensor=1,tensor=2", "zero=-1", "sequence_parallel=yes", "width=3"])
def test_what_is_no_layout(text: str) -> None:
    with pytest.raises(Refusal):
        parse_layout(text)


def test_layouts() -> None:
    assert parse_layout("tensor=2, zero=0,sequence_parallel=true") == {"tensor": 2, "zero": 0, "sequence_parallel": True}
