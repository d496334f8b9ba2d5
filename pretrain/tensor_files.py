"""Named tensors in safetensors files: one file, or shards with an index, read and written a tensor or a shard at a time.

    FOLDER/STEM.safetensors                                      where everything fits into one shard, or
    FOLDER/STEM-00001-of-00003.safetensors ...                   shards of at most about SHARD_BYTES, and
    FOLDER/STEM.safetensors.index.json                           {"metadata": {"total_size": bytes}, "weight_map": {name: file}}

This is the layout that Hugging Face's libraries read and write, so checkpoints, exports and imports share it. Nothing in such a file can
run code. Memory stays at a tensor, whatever the whole size. Refused when opened, before any tensor is read: a file that is cut
short or damaged, a shard that is missing, names that index and shards do not agree on, and a file name that leads out of the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import durable
from pretrain.errors import Refusal

SHARD_BYTES = 1 << 30
"""Size of a shard; a larger tensor has one to itself."""

Shapes = Mapping[str, Tensor]
"""What is to be written, by name: tensors of which shape and dtype are read, such as those of the meta device."""


def index_path(folder: Path, stem: str) -> Path:
    """Where the index of several shards lies."""
    return folder / f"{stem}.safetensors.index.json"


def holds(folder: Path, stem: str) -> bool:
    """Whether `folder` has tensors called `stem`, whole or not."""
    return (folder / f"{stem}.safetensors").exists() or index_path(folder, stem).exists()


def in_order(shapes: Shapes) -> list[str]:
    """Names as they are written: the widest types first, so that every tensor of a file is aligned; of one type, as they come."""
    return sorted(shapes, key=lambda name: -shapes[name].element_size())


def write_tensors(
    folder: Path,
    stem: str,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[float], None] = lambda _: None,
) -> list[Path]:
    """Writes every tensor of `shapes`, each asked of `read` once, `in_order`, and fsyncs the files; returns them.

    progress is told the share of the bytes written. Raises OSError when the disk refuses, ValueError for another shape or dtype.
    """
    shards = list(_shards(shapes, shard_bytes))
    total = sum(tensor.nbytes for tensor in shapes.values())
    names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    done = 0
    for file, shard in zip(names, shards, strict=True):
        _write(folder / file, {name: shapes[name] for name in shard}, read, metadata)
        done += sum(shapes[name].nbytes for name in shard)
        progress(done / max(total, 1))
    paths = [folder / file for file in names]
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        durable.write_text(index_path(folder, stem), json.dumps(index, indent=1) + "\n")
        paths.append(index_path(folder, stem))
    return paths


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One file, fsynced. Raises OSError when the disk refuses."""
    _write(path, tensors, tensors.__getitem__, metadata)


def _write(path: Path, shapes: Shapes, read: Callable[[str], Tensor], metadata: Mapping[str, str] | None) -> None:
    """A tensor at a time: 8 bytes for the length of the header, the header (JSON), then the tensors' bytes in its order.

    The library's own writer copies every tensor, and holds the interpreter's lock while it writes: others could not read or hash meanwhile.
    """
    names = in_order(shapes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        like = shapes[name]
        header[name] = {"dtype": _SPELT[like.dtype], "shape": list(like.shape), "data_offsets": [end, end + like.nbytes]}
        end += like.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def writer(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = _checked(name, read(name), shapes[name])
            if tensor.nbytes:
                file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    try:
        durable.write(path, writer)
    except OSError as error:  # a full disk says nothing of the file
        raise OSError(error.errno, f"{path.name}: {error.strerror}") from error


def _shards(shapes: Shapes, limit: int) -> Iterator[list[str]]:
    """Names in order, cut where a shard would grow past the limit; at least one shard."""
    shard: list[str] = []
    size = 0
    for name in in_order(shapes):
        tensor = shapes[name]
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _checked(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} where {like.dtype} {tuple(like.shape)} was announced")
    return tensor.contiguous()


class TensorFiles:
    """Opened tensors: `shapes` by name (on the meta device), and `read` of one at a time. A context manager."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises Refusal for files that are missing, damaged or not as their index says."""
        self.folder, self.stem = folder, stem
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        """By tensor."""
        self.shapes: dict[str, Tensor] = {}
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own. Raises KeyError for a name there is not."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read_rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows first:stop of a tensor that has any, without reading the others."""
        tensor: Tensor = self._files[name].get_slice(name)[first:stop]
        return tensor

    def close(self) -> None:
        """Closes the files; tensors that were read stay."""
        self._files.clear()
        self._open.close()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_all(self) -> None:
        index, single = index_path(self.folder, self.stem), self.folder / f"{self.stem}.safetensors"
        if not index.exists():
            if not single.exists():
                raise Refusal(f"There are no weights in {self.folder}: it has neither {single.name} nor {index.name}. Check the path.")
            self._open_file(single, None)
            return
        weight_map = _read_index(index)
        for file in sorted(set(weight_map.values())):
            expected = {name for name, there in weight_map.items() if there == file}
            self._open_file(_inside(self.folder, file, index), expected)

    def _open_file(self, path: Path, expected: set[str] | None) -> None:
        """expected: the names the index gives it."""
        if not os.path.isfile(path):  # a name that no disk can hold is missing too
            raise Refusal(
                f"The shard {path} is missing, which {index_path(self.folder, self.stem).name} names. Copy the folder again, whole."
            )
        try:
            file = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            found = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise Refusal(
                f"{path} is no whole safetensors file ({error}): it is cut short or damaged. Copy it again from its source."
            ) from error
        if expected is not None and set(found) != expected:
            name = min(set(found) ^ expected)
            where = "is in the index but not in the file" if name in expected else "is in the file but not in the index"
            raise Refusal(f"{path} and its index disagree: {name} {where}. They are not of one export: copy the folder again, whole.")
        for name in found:
            part = file.get_slice(name)
            self.shapes[name] = torch.empty(part.get_shape(), dtype=_dtype(path, name, part.get_dtype()), device="meta")
            self._files[name] = file


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SPELT = {dtype: spelt for spelt, dtype in _DTYPES.items()}


def _dtype(path: Path, name: str, spelt: str) -> torch.dtype:
    if spelt not in _DTYPES:
        raise Refusal(f"{name} in {path} has the type {spelt}, which is read nowhere here. Write it as one of {', '.join(_DTYPES)}.")
    return _DTYPES[spelt]


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()):
            raise ValueError("weight_map is not of names to file names")
        return dict(weight_map)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}. Mend its permissions.") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{path} is no index of safetensors shards ({error}). Copy the folder again from its source.") from error


def _inside(folder: Path, file: str, index: Path) -> Path:
    if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
        raise Refusal(
            f"{index} names the file {file!r}, which is not a plain name in its own folder: following it could read anything. Nothing was "
            f"loaded; take the weights from a source you trust."
        )
    return folder / file
