"""A canonical checkpoint: whole or not there, readable by name, and refused by the words of what is wrong with it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain import canonical, tensor_files
from pretrain import checkpoint_files as files
from pretrain.canonical import Source, write_canonical
from pretrain.checkpoint_choice import newest_whole
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.stored import open_stored
from pretrain.training_state import TrainingState

WEIGHTS = {"table": torch.arange(12.0).view(4, 3), "norm": torch.arange(5.0), "gate": torch.tensor(2.5)}
STATE = TrainingState(tokens=70, config={"train": {"seed": 1}})


def slots(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    moments = {f"{name}/{slot}": tensor + shift for name, tensor in weights.items() for shift, slot in ((1, "exp_avg"), (2, "exp_avg_sq"))}
    return {**moments, **{f"{name}/step": torch.tensor(7.0) for name in weights}}


def source(tensors: dict[str, Tensor]) -> Source:
    return Source(tensors, tensors.__getitem__)


def write(folder: Path, step: int = 7, **others: dict[str, Tensor]) -> Path:
    return write_canonical(folder, step, STATE, {"weights": source(WEIGHTS), **{stem: source(part) for stem, part in others.items()}})


def read(path: Path, name: str, slot: str, first: int, stop: int) -> Tensor:
    with open_stored(path, files.verify(path)) as stored:
        return stored.rows(name, slot, first, stop)


def test_every_tensor_comes_back_by_name_and_slot(tmp_path: Path) -> None:
    average = {name: tensor * 2 for name, tensor in WEIGHTS.items()}
    path = write(tmp_path, average=average, optimizer=slots(WEIGHTS))
    assert path == tmp_path / "step-00000007"
    assert files.read_pointer(tmp_path) == path.name
    assert TrainingState.from_json((path / "state.json").read_text()) == STATE
    with open_stored(path, files.verify(path)) as stored:
        assert dict(stored.shapes) == {"table": (4, 3), "norm": (5,), "gate": ()}
        assert set(stored.slots("table")) == {"weight", "ema", "exp_avg", "exp_avg_sq", "step"}
        assert torch.equal(stored.rows("table", "exp_avg", 1, 3), WEIGHTS["table"][1:3] + 1)
        assert torch.equal(stored.rows("norm", "ema", 0, 5), average["norm"])
        assert torch.equal(stored.rows("gate", "weight", 0, 1), torch.tensor([2.5]))
        assert stored.step("gate") == 7


def test_weights_alone_are_a_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, step=0)
    assert newest_whole(tmp_path) == path
    with open_stored(path, files.verify(path)) as stored:
        assert stored.slots("norm") == ["weight"]
    with pytest.raises(ValueError, match="without weights"):
        write_canonical(tmp_path, 1, STATE, {})


def test_shards_are_read_ahead_in_order_and_all_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.full((3,), float(number)) for number in range(9)}
    tensors = {"half": torch.zeros(3, dtype=torch.bfloat16), **tensors}  # narrower: it is written last, and must be read as what it is
    monkeypatch.setattr(canonical, "AHEAD_BYTES", 20)
    monkeypatch.setattr(tensor_files.write_tensors, "__kwdefaults__", {**tensor_files.write_tensors.__kwdefaults__, "shard_bytes": 24})
    asked: list[str] = []
    told: list[float] = []

    def ask(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    path = write_canonical(tmp_path, 1, STATE, {"weights": Source(tensors, ask)}, told.append)
    assert asked == [*list(tensors)[1:], "half"]
    assert len(list(path.glob("weights-*-of-00005.safetensors"))) == 5
    assert told == sorted(told)
    assert told[-1] == 1
    assert {entry.name for entry in files.verify(path).files} == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert all(torch.equal(read(path, name, "weight", 0, 3), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), Refusal("a torn source")])
def test_nothing_is_left_of_one_that_failed(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path, step=1)

    def fail(name: str) -> Tensor:
        raise error

    with pytest.raises(RunStopped if isinstance(error, OSError) else type(error)) as raised:
        write_canonical(tmp_path, 2, STATE, {"weights": source(WEIGHTS), "optimizer": Source(slots(WEIGHTS), fail)})
    if isinstance(raised.value, RunStopped):
        assert raised.value.code == BAD_CHECKPOINT_WRITE
        assert "No space left on device" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert newest_whole(tmp_path).name == "step-00000001"


def test_what_is_not_confirmed_takes_no_name(tmp_path: Path) -> None:
    def damaged() -> None:
        raise files.BadCheckpoint("the source is torn")

    with pytest.raises(files.BadCheckpoint):
        write_canonical(tmp_path, 2, STATE, {"weights": source(WEIGHTS)}, confirm=damaged)
    assert list(tmp_path.iterdir()) == []


# --- what is wrong with one


def _relist(path: Path) -> None:
    """A manifest that fits what lies there: damage by somebody who can hash."""
    manifest = files.read_manifest(path)
    entries = [files.describe(file, 0) for file in sorted(path.iterdir()) if file.name != files.MANIFEST]
    files.write_manifest(path, files.CheckpointManifest(manifest.step, manifest.layout, manifest.versions, entries))


def _truncate(path: Path) -> None:
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _lose_a_shard(path: Path) -> None:
    index = {"weight_map": {"norm": "weights-00001-of-00002.safetensors", "table": "weights-00002-of-00002.safetensors"}}
    (path / "weights.safetensors").rename(path / "weights-00001-of-00002.safetensors")
    (path / "weights.safetensors.index.json").write_text(json.dumps(index))


def _climb(path: Path) -> None:
    (path / "weights.safetensors").unlink()
    (path / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm": "../../outside.safetensors"}}))


def _unknown_tensor(path: Path) -> None:
    tensor_files.write_file(path / "optimizer.safetensors", {"stranger/exp_avg": torch.zeros(2)})


def _other_shape(path: Path) -> None:
    tensor_files.write_file(path / "optimizer.safetensors", {"norm/exp_avg": torch.zeros(2)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "no whole safetensors file"),
        (_lose_a_shard, "disagree|is missing"),
        (_climb, "not a plain name in its own folder"),
        (_unknown_tensor, "holds stranger/exp_avg, but there is no such parameter"),
        (_other_shape, r"norm/exp_avg, but its shape \(2,\) is not the parameter's"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    path = write(tmp_path)
    damage(path)
    with pytest.raises(files.BadCheckpoint):
        files.verify(path)
    with pytest.raises(Refusal, match="No whole checkpoint is left"):
        newest_whole(tmp_path)
    _relist(path)
    with pytest.raises(Refusal, match=said):
        open_stored(path, files.read_manifest(path))


def test_readers_of_weights_do_not_hash_the_optimizer(tmp_path: Path) -> None:
    path = write(tmp_path, optimizer=slots(WEIGHTS))
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert newest_whole(tmp_path) == path
    with pytest.raises(files.BadCheckpoint, match=r"optimizer\.safetensors does not match its sha256"):
        files.verify(path)
