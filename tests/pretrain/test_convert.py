"""Conversion to a canonical checkpoint from the files that ranks leave: bit for bit, whole or not at all, and never by running code.

The checkpoints are synthetic (pretrain/bench_checkpoint.py); that real engines' come back is held by
tests/distributed/test_layout_change.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import bench_checkpoint as bench
from pretrain import checkpoint_files as files
from pretrain.bench_checkpoint import synthesise
from pretrain.config import Recipe, load_recipe
from pretrain.convert import convert
from pretrain.errors import Refusal
from pretrain.loaded import recipe_of
from pretrain.pieces import pieces_file
from pretrain.stored import STEP, open_stored, rows_of
from pretrain.training_state import TrainingState

SMALL = ["model.width=16", "model.heads=2", "model.backbone_layers=2", "model.vocabulary_size=320", "data.sequence_length=16"]
STEP_NAME = "step-00001000"


def tiny(zero: int = 1, *overrides: str) -> Recipe:
    recipe = load_recipe("demo", [*SMALL, "train.micro_batch=2", "train.global_batch=4", "data.path=nowhere", *overrides])
    return recipe.model_copy(update={"layout": recipe.layout.model_copy(update={"zero": zero})})


@pytest.fixture(params=[(1, 1), (1, 3), (3, 3)], ids=["1 rank", "ZeRO 1", "ZeRO 3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    zero, ranks = request.param
    synthesise(tiny(zero), tmp_path / "run", ranks)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1000, "loss": 3.0}\n')
    return tmp_path / "run"


@pytest.fixture
def run_of_one(tmp_path: Path) -> Path:
    synthesise(tiny(), tmp_path / "run", 1)
    return tmp_path / "run"


def content(path: Path) -> dict[str, Any]:
    with open_stored(path, files.verify(path)) as stored:
        return {
            f"{name}/{slot}": stored.step(name) if slot == STEP else stored.rows(name, slot, 0, rows_of(shape))
            for name, shape in stored.shapes.items()
            for slot in stored.slots(name)
        }


def assert_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_out_makes_a_run_and_leaves_the_other_alone(run: Path) -> None:
    before, there = content(run / "checkpoints" / STEP_NAME), names(run)
    done = convert(run, {"pipeline": 2, "zero": 1}, run.with_name("moved"))
    made = run.with_name("moved")
    path = made / "checkpoints" / STEP_NAME
    assert done["checkpoint"] == str(path)
    assert (done["ranks"], done["after"]) == (2, {"pipeline": 2, "data": 1, "tensor": 1, "zero": 1})
    assert files.verify(path).layout == {}
    assert_same(content(path), before)
    assert names(run) == there
    assert names(made) == there
    recipe = recipe_of(made)
    assert (recipe.layout.pipeline, recipe.layout.zero, recipe.run.dir) == (2, 1, str(made))
    assert TrainingState.from_json((path / "state.json").read_text()).config == recipe.model_dump(mode="json")
    assert names(run.parent) == ["moved", "run"]


def test_in_place_the_converted_one_takes_the_name_and_older_ones_stay(run: Path) -> None:
    checkpoints = run / "checkpoints"
    before = content(checkpoints / STEP_NAME)
    older = files.start_partial(checkpoints, 500)
    files.write_manifest(older, files.CheckpointManifest(500, {"world_size": 1, "zero": 1}, {}, []))
    older.rename(checkpoints / "step-00000500")
    convert(run, {"tensor": 2, "zero": 1}, None)
    assert names(checkpoints) == ["latest", "step-00000500", STEP_NAME]
    assert_same(content(checkpoints / STEP_NAME), before)
    assert recipe_of(run).layout.tensor == 2
    convert(run, {"data": 2, "zero": 3}, None)  # a canonical one too
    assert_same(content(checkpoints / STEP_NAME), before)
    assert recipe_of(run).layout.zero == 3


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"tensor": 3}, r"layout.tensor=3 does not divide model.heads=2"),
        ({"pipeline": 2, "zero": 3}, r"layout.zero=3 cannot be combined with layout.pipeline=2"),
        ({"pipeline": 9}, r"layout.pipeline=9 leaves stages without blocks"),
        ({"data": 3}, r"does not divide into micro-batches of train.micro_batch=2 on 3 data ranks"),
    ],
)
def test_an_illegal_layout_is_refused(run_of_one: Path, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        convert(run_of_one, wanted, run_of_one.with_name("moved"))
    assert names(run_of_one.parent) == ["run"]


def test_the_batch_can_be_cut_otherwise(run_of_one: Path) -> None:
    done = convert(run_of_one, {"data": 4, "micro_batch": 1}, run_of_one.with_name("moved"))
    assert done["ranks"] == 4
    assert recipe_of(run_of_one.with_name("moved")).train.micro_batch == 1


def test_a_target_that_exists_is_refused(run_of_one: Path) -> None:
    run_of_one.with_name("moved").mkdir()
    with pytest.raises(Refusal, match="moved exists"):
        convert(run_of_one, {}, run_of_one.with_name("moved"))
    assert names(run_of_one.with_name("moved")) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_is_left_out_for_the_one_before(run_of_one: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = run_of_one / "checkpoints"
    shutil.copytree(checkpoints / STEP_NAME, checkpoints / "step-00002000")
    manifest = files.read_manifest(checkpoints / "step-00002000")
    files.write_manifest(checkpoints / "step-00002000", files.CheckpointManifest(2000, manifest.layout, manifest.versions, manifest.files))
    (checkpoints / "latest").write_text("step-00002000\n")
    flip(next((checkpoints / "step-00002000").glob("*optim_states.pt")))
    done = convert(run_of_one, {}, run_of_one.with_name("moved"))
    assert done["step"] == 1000
    assert "optim_states.pt does not match its sha256" in caplog.text
    flip(next((checkpoints / STEP_NAME).glob("*optim_states.pt")))
    with pytest.raises(Refusal, match="No whole checkpoint is left"):
        convert(run_of_one, {}, run_of_one.with_name("again"))
    assert names(run_of_one.parent) == ["moved", "run"]


class _Bomb:
    """Unpickled, it makes the folder it was given."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def relist(path: Path) -> None:
    """A manifest that fits what lies there."""
    manifest = files.read_manifest(path)
    entries = [files.describe(path / entry.name, entry.rank) for entry in manifest.files]
    files.write_manifest(path, files.CheckpointManifest(manifest.step, manifest.layout, manifest.versions, entries))


def test_a_planted_pickle_is_refused_and_does_not_run(run_of_one: Path, tmp_path: Path) -> None:
    path = run_of_one / "checkpoints" / STEP_NAME
    torch.save({"optimizer_state_dict": _Bomb(tmp_path / "ran")}, next(path.glob("*optim_states.pt")))
    relist(path)
    with pytest.raises(Refusal, match=r"optim_states.pt holds .*mkdir"):
        convert(run_of_one, {}, run_of_one.with_name("moved"))
    assert names(tmp_path) == ["run"]


def _torn(pieces: dict[str, Any]) -> None:
    pieces["masters"][0][0][5] = 5


def _twice(pieces: dict[str, Any]) -> None:
    pieces["masters"][0].append(pieces["masters"][0][0])


def _gone(pieces: dict[str, Any]) -> None:
    del pieces["masters"][-1][-1]


def _stranger(pieces: dict[str, Any]) -> None:
    pieces["masters"][0].append(["stranger", 0, 1, 0, 0, 4, 0])


def _half_of_three(pieces: dict[str, Any]) -> None:
    pieces["masters"][0][0][2] = 3


def _along_the_third(pieces: dict[str, Any]) -> None:
    name, _, _, _, _, stop, offset = pieces["masters"][0][0]
    pieces["masters"][0][:1] = [[name, 2, 2, shard, 0, stop // 2, offset] for shard in (0, 1)]


def _beyond(pieces: dict[str, Any]) -> None:
    pieces["masters"][0][0][6] = 1 << 40


def _before(pieces: dict[str, Any]) -> None:
    pieces["masters"][0][0][6] = -64


def _one_master_more(pieces: dict[str, Any]) -> None:
    pieces["masters"] = [[], *pieces["masters"]]


def _of_two(pieces: dict[str, Any]) -> None:
    pieces["layout"] |= {"data": 2, "world_size": 2}


def _words(pieces: dict[str, Any]) -> None:
    pieces["shapes"] = {name: "16" for name in pieces["shapes"]}


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (_torn, r"pieces .* do not make .* whole"),
        (_twice, r"pieces .* do not make .* whole"),
        (_gone, r"pieces .* do not make .* whole"),
        (_stranger, r"pieces .* do not make stranger whole"),
        (_half_of_three, r"pieces .* do not make .* whole"),
        (_along_the_third, r"pieces .* do not make .* whole"),
        (_beyond, "rank 0 holds .* where its file holds something else"),
        (_before, "does not say what rank 0 held"),
        (_one_master_more, "rank 0 holds .* where its file holds something else"),
        (_of_two, "does not say what rank 0 held"),
        (_words, "does not say what rank 0 held"),
    ],
)
def test_pieces_that_lie_are_refused_and_nothing_is_written(run_of_one: Path, lie: Callable[[dict[str, Any]], None], said: str) -> None:
    path = run_of_one / "checkpoints" / STEP_NAME
    pieces = json.loads((path / pieces_file(0)).read_text())
    lie(pieces)
    (path / pieces_file(0)).write_text(json.dumps(pieces))
    relist(path)
    before = names(path)
    for out in (run_of_one.with_name("moved"), None):
        with pytest.raises(Refusal, match=said):
            convert(run_of_one, {}, out)
    assert names(run_of_one.parent) == ["run"]
    assert names(path) == before
    assert files.verify(path).layout


def test_a_file_that_holds_something_else_is_refused(run_of_one: Path) -> None:
    path = run_of_one / "checkpoints" / STEP_NAME
    file = next(path.glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": {"base_optimizer_state": {"state": {}}, "single_partition_of_fp32_groups": ["a word"]}}, file)
    relist(path)
    with pytest.raises(Refusal, match="does not hold an optimizer's state as ZeRO stage 1 leaves it"):
        convert(run_of_one, {}, run_of_one.with_name("moved"))


@pytest.mark.parametrize("place", [10, -30], ids=["the pickle", "the directory of the archive"])
def test_damage_in_a_pickle_is_damage_and_the_one_before_is_taken(run_of_one: Path, place: int) -> None:
    checkpoints = run_of_one / "checkpoints"
    newer = checkpoints / "step-00002000"
    shutil.copytree(checkpoints / STEP_NAME, newer)
    manifest = files.read_manifest(newer)
    files.write_manifest(newer, files.CheckpointManifest(2000, manifest.layout, manifest.versions, manifest.files))
    (checkpoints / "latest").write_text("step-00002000\n")
    file = next(newer.glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[place] ^= 255
    file.write_bytes(data)
    assert convert(run_of_one, {}, run_of_one.with_name("moved"))["step"] == 1000


def test_a_checkpoint_of_before_there_were_pieces_is_refused(run_of_one: Path) -> None:
    path = run_of_one / "checkpoints" / STEP_NAME
    manifest = files.read_manifest(path)
    kept = [entry for entry in manifest.files if entry.name != pieces_file(0)]
    (path / pieces_file(0)).unlink()
    files.write_manifest(path, files.CheckpointManifest(manifest.step, {"world_size": 1, "zero": 1}, manifest.versions, kept))
    with pytest.raises(Refusal, match="do not say what each rank held"):
        convert(run_of_one, {}, run_of_one.with_name("moved"))


def test_another_model_s_checkpoint_is_refused(run_of_one: Path) -> None:
    (run_of_one / "config.yaml").write_text(tiny(1, "model.width=32").to_yaml())
    with pytest.raises(Refusal, match="not those of the model"):
        convert(run_of_one, {}, None)
    assert files.verify(run_of_one / "checkpoints" / STEP_NAME).layout


def test_the_benchmark_times_both_layouts_beside_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_timed", bench._measure)  # in this process: starting others takes seconds
    rows = bench.bench_checkpoint(tiny(), 2, tmp_path)
    assert [(row["measure"], row["layout"]) for row in rows] == [
        ("copy", "2 ranks, ZeRO 1"),
        ("convert", "2 ranks, ZeRO 1"),
        ("copy", "2 ranks, ZeRO 3"),
        ("convert", "2 ranks, ZeRO 3"),
        ("copy", "any"),
        ("export", "any"),
    ]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 1 << 20 for row in rows)
    assert names(tmp_path) == []
