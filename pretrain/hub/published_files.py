"""Published weights, opened: their configuration, and their tensors by name, read one at a time. Nothing in them runs.

    DIR/config.json, DIR/pytorch_model.bin | model.pt | model.safetensors        a published model (save_pretrained)
    DIR/model_config.json, DIR/checkpoints-*/last-*                              a training run of the public code, or one file of it

Files of torch.save are mapped, not read: a tensor costs memory while it is looked at. They go through torch's weights-only unpickler,
which builds tensors and plain containers. What else a file names is known before it is opened, and refused, with one exception: a training
checkpoint carries objects of its own code beside the weights (loaders, schedules, random states), and these alone, by module
(SAVED_BY_TRAINING), come back as empty placeholders: their code is not looked up, let alone run.

Refused: a file cut short, a pickle that would run code, a missing or misnamed shard, something that holds no tensors by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import Refusal
from pretrain.hub.export_config import read_json_object
from pretrain.run_folder import CONFIG as OWN_CONFIG
from pretrain.tensor_files import TensorFiles, holds, index_path

CONFIG, RUN_CONFIG = "config.json", "model_config.json"
PICKLES = ("pytorch_model.bin", "model.pt")
STEM = "model"
PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.")
"""What DDP, torch.compile and Fabric put before a name."""
SAVED_BY_TRAINING = ("attractor", "recpre", "numpy", "pathlib", "functools", "torch", "lightning", "transformers", "tokenizers", "datasets")
"""Packages whose objects the public train.py keeps in its checkpoints, beside the weights."""


@dataclass(frozen=True)
class Published:
    """Weights by their published names, and the configuration they come with."""

    config: dict[str, Any]
    config_file: Path
    files: list[Path]
    """Of the weights."""
    shapes: Mapping[str, Tensor]
    """Only shape and dtype are to be read."""
    read: Callable[[str], Tensor]
    """The tensor of that name, on the CPU; of a mapped file, without a copy."""
    close: Callable[[], None] = lambda: None
    """Closes the files; what is mapped is let go with its tensors."""

    @property
    def own(self) -> bool:
        """Whether it is an export of ours, with canonical names."""
        return self.config.get("model_type") == "attractor" and isinstance(self.config.get("model"), dict)


def open_published(path: Path) -> Published:
    """What lies at `path`: a folder, or a checkpoint file of a training run. Raises Refusal."""
    if path.is_file():
        config = next((folder / RUN_CONFIG for folder in (path.parent, path.parent.parent) if (folder / RUN_CONFIG).is_file()), None)
        if config is None:
            raise Refusal(f"There is no {RUN_CONFIG} beside {path} or one folder above: keep the checkpoint in its training run's folder.")
        return _training(path, config)
    if not path.is_dir():
        raise Refusal(f"There is nothing at {path}. Give the folder of a published model, or of a training run.")
    if (path / RUN_CONFIG).is_file():
        return _training(_checkpoint_of(path), path / RUN_CONFIG)
    if not (path / CONFIG).is_file():
        if (path / OWN_CONFIG).is_file():
            raise Refusal(f"{path} holds a run of `attractor train`, not published weights: it needs no import. Use it as it is.")
        raise Refusal(f"{path} has neither {CONFIG} nor {RUN_CONFIG}: it is no published model and no training run. Check the path.")
    return _model(path)


def _model(folder: Path) -> Published:
    config = read_json_object(folder / CONFIG)
    if holds(folder, STEM):
        tensors = TensorFiles(folder, STEM)
        index = index_path(folder, STEM)
        files = [index, *sorted(folder.glob(f"{STEM}-*.safetensors"))] if index.exists() else [folder / f"{STEM}.safetensors"]
        names = _stripped(tensors.shapes, folder)
        shapes = {short: tensors.shapes[name] for short, name in names.items()}
        return Published(config, folder / CONFIG, files, shapes, lambda short: tensors.read(names[short]), tensors.close)
    file = next((folder / name for name in PICKLES if (folder / name).is_file()), None)
    if file is None:
        raise Refusal(
            f"There are no weights in {folder}: it has none of {', '.join(PICKLES)} and {STEM}.safetensors. Copy it again, whole."
        )
    return _pickled(_load(file, []), file, config, folder / CONFIG)


def _training(file: Path, config: Path) -> Published:
    state = _load(file, SAVED_BY_TRAINING)
    if not isinstance(state, dict) or not isinstance(state.get("model", state), dict):
        raise Refusal(f"{file} holds no weights by name under `model`: it is no checkpoint of the public training code.")
    return _pickled(state.get("model", state), file, read_json_object(config), config)


def _checkpoint_of(run: Path) -> Path:
    """The checkpoint of a training run: the last, else the best, else the one there is. Raises Refusal where that leaves a choice."""
    files = sorted(path for path in run.glob("checkpoints-*/*") if path.is_file())
    for start in ("last-", "best-", ""):
        if named := [path for path in files if path.name.startswith(start)]:
            if len(named) == 1:
                return named[0]
            raise Refusal(f"{run} has several checkpoints ({', '.join(path.name for path in named[:4])}): give the path of one of them.")
    raise Refusal(f"{run} has no checkpoint file in a folder checkpoints-*. Give the folder of a training run that has saved one.")


def _pickled(state: Any, file: Path, config: dict[str, Any], config_file: Path) -> Published:
    if not isinstance(state, dict) or not state:
        raise Refusal(f"{file} holds no tensors by name: it is no published model. Check the path.")
    wrong = [name for name, value in state.items() if type(name) is not str or not _whole(value)]
    if wrong:
        raise Refusal(f"{file} holds {wrong[0]!r}, which is no plain tensor: only weights by name are imported. Check the path.")
    names = _stripped(state, file)
    tensors = {short: state[name].detach() for short, name in names.items()}
    return Published(config, config_file, [file], tensors, tensors.__getitem__)


def _whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _stripped(names: Mapping[str, Any], where: Path) -> dict[str, str]:
    """The stored name by the name without prefixes. Raises Refusal where two become one."""
    short: dict[str, str] = {}
    for name in names:
        bare = name
        while prefix := next((prefix for prefix in PREFIXES if bare.startswith(prefix)), ""):
            bare = bare.removeprefix(prefix)
        if bare in short:
            raise Refusal(f"{where} holds {bare} twice, as {short[bare]} and as {name}: which is meant is not known.")
        short[bare] = name
    return short


class _Placeholder:
    """What stands for an object that is not wanted: it takes anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _load(file: Path, packages: tuple[str, ...] | list[str]) -> Any:
    """What torch.save wrote, mapped; objects of `packages` as placeholders. Raises Refusal before anything is built for any other."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        if unsafe := sorted(name for name in foreign if name.partition(".")[0] not in packages):
            raise Refusal(
                f"{file} is refused: it names {', '.join(unsafe[:4])}, which is no tensor and no plain data. Loading it could run code, so "
                f"nothing of it was loaded. If it is a training checkpoint that you trust, write its weights alone with the public code's "
                f"own scripts/_export_attractor_for_hf.py and import what that writes."
            )
        with torch.serialization.safe_globals([(_Placeholder, name) for name in foreign]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, KeyError, EOFError, IndexError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        said = (str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f"{file} is no whole file of torch.save ({said}): it is cut short, damaged, or of another kind. Copy it again from its source."
        ) from error
    except OSError as error:
        raise Refusal(f"{file} cannot be read: {error.strerror or error}. Mend its permissions.") from error
