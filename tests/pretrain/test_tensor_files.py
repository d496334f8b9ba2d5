"""Named tensors in one file or in shards: what goes in comes out, and what is damaged is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import Refusal
from pretrain.tensor_files import TensorFiles, in_order, index_path, write_tensors


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 8, generator=generator),
        "b": torch.randn(3, 5, generator=generator).to(torch.bfloat16),  # an odd number of bytes to 4: what follows must stay aligned
        "c": torch.arange(6).view(2, 3),
        "d": torch.tensor(7, dtype=torch.int64),
    }


def write(folder: Path, shard_bytes: int = 1 << 20) -> dict[str, Tensor]:
    held = tensors()
    folder.mkdir(exist_ok=True)
    write_tensors(folder, "weights", held, held.__getitem__, shard_bytes=shard_bytes)
    return held


@pytest.mark.parametrize(("shard_bytes", "files"), [(1 << 20, 1), (60, 3), (1, 4)])
def test_what_goes_in_comes_out(tmp_path: Path, shard_bytes: int, files: int) -> None:
    held = write(tmp_path, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert index_path(tmp_path, "weights").exists() == (files > 1)
    with TensorFiles(tmp_path, "weights") as opened:
        assert {name: (part.shape, part.dtype) for name, part in opened.shapes.items()} == {
            name: (part.shape, part.dtype) for name, part in held.items()
        }
        for name, tensor in held.items():
            assert torch.equal(opened.read(name), tensor)
        assert torch.equal(opened.read_rows("a", 1, 3), held["a"][1:3])


def test_files_are_those_that_the_library_reads_and_may_be_read_by_whom_others_may(tmp_path: Path) -> None:
    held = write(tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert all(torch.equal(tensor, held[name]) for name, tensor in load_file(tmp_path / "weights.safetensors").items())


@pytest.mark.parametrize("shard_bytes", [1 << 20, 60])
def test_each_tensor_is_asked_for_once_and_in_order(tmp_path: Path, shard_bytes: int) -> None:
    held, asked, told = tensors(), [], []

    def read(name: str) -> Tensor:
        asked.append(name)
        return held[name]

    write_tensors(tmp_path, "x", held, read, shard_bytes=shard_bytes, progress=told.append)
    assert asked == in_order(held) == ["c", "d", "a", "b"]
    assert told == sorted(told)
    assert told[-1] == 1


def test_another_shape_than_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path, "x", {"a": torch.empty(2, 2, device="meta")}, lambda _: torch.zeros(3))


def test_a_full_disk_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match=r"x\.safetensors"):
        write_tensors(Path("/proc"), "x", tensors(), tensors().__getitem__)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no weights"):
        TensorFiles(tmp_path, "weights")


def test_a_file_cut_short(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Refusal, match="cut short or damaged"):
        TensorFiles(tmp_path, "weights")


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, 60)
    (tmp_path / "weights-00002-of-00003.safetensors").unlink()
    with pytest.raises(Refusal, match=r"weights-00002-of-00003\.safetensors is missing"):
        TensorFiles(tmp_path, "weights")


@pytest.mark.parametrize(("name", "said"), [("z", "z is in the index but not in the file"), ("a", "a is in the file but not in the index")])
def test_an_index_of_other_shards(tmp_path: Path, name: str, said: str) -> None:
    write(tmp_path, 1)
    index = json.loads(index_path(tmp_path, "weights").read_text())
    if name == "z":
        index["weight_map"]["z"] = index["weight_map"]["b"]
    else:
        index["weight_map"]["b"] = index["weight_map"].pop("a")
    index_path(tmp_path, "weights").write_text(json.dumps(index))
    with pytest.raises(Refusal, match=said):
        TensorFiles(tmp_path, "weights")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..", "deeper/one.safetensors", "..\\one"])
def test_a_path_that_climbs_out_is_not_followed(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "inner"
    write(folder, 1)
    write(tmp_path)
    (tmp_path / "weights.safetensors").rename(tmp_path / "outside.safetensors")
    index = json.loads(index_path(folder, "weights").read_text())
    index["weight_map"] = dict.fromkeys(tensors(), file)
    index_path(folder, "weights").write_text(json.dumps(index))
    with pytest.raises(Refusal, match="not a plain name in its own folder"):
        TensorFiles(folder, "weights")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    index_path(tmp_path, "weights").write_text(text)
    with pytest.raises(Refusal, match="no index of safetensors shards"):
        TensorFiles(tmp_path, "weights")
