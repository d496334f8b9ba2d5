"""What `attractor checkpoint ls` and `verify` tell of a run's checkpoints. Reads, and touches nothing; `listing` imports no torch.

`listing` looks at names and sizes, which costs nothing; `verify_run` hashes every file and looks into every pickle without loading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import checkpoint_files as files
from pretrain.checkpoint_files import BadCheckpoint
from pretrain.errors import Refusal
from pretrain.run_folder import CHECKPOINTS, EVALUATIONS, METRICS


def listing(run: Path) -> dict[str, Any]:
    """The checkpoints of a run, oldest first, and what interrupted saves left. Raises Refusal for a folder that holds none.

    loss: of training at that step; validation: of the evaluation at it, at the last of its depths. None where the record has none.
    """
    folder = run / CHECKPOINTS
    names, pointer = _names(run), files.read_pointer(folder)
    losses, validation = _losses(run / METRICS), _losses(run / EVALUATIONS)
    rows = []
    for name in reversed(names):
        step = files.step_of(name)
        row: dict[str, Any] = {"step": step, "latest": name == pointer, "whole": True, "fault": "", "bytes": _bytes(folder / name)}
        row |= {"layout": None, "tokens": None, "loss": losses.get(step), "validation": validation.get(step)}
        try:
            row["layout"] = files.verify(folder / name, reads=lambda *_: False).layout
            row["tokens"] = int(json.loads((folder / name / "state.json").read_bytes())["tokens"])
        except BadCheckpoint as fault:
            row |= {"whole": False, "fault": str(fault)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            row |= {"whole": False, "fault": f"state.json cannot be read ({error})"}
        rows.append(row)
    return {"run": str(run), "latest": pointer, "checkpoints": rows, "leftovers": [path.name for path in files.leftovers(folder)]}


def verify_run(run: Path, step: int | None, progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Hashes every file of every checkpoint of a run, or of that of `step`; what was read.

    Raises Refusal, naming every damaged checkpoint, and for one with a pickle that would run code.
    """
    import torch

    from pretrain.checkpoint_choice import refuse_unsafe, unsafe_files
    from pretrain.runtime import settle_libraries

    settle_libraries(torch.device("cpu"))
    folder, names = run / CHECKPOINTS, _names(run)
    if step is not None:
        if files.step_name(step) not in names:
            there = ", ".join(str(files.step_of(name)) for name in reversed(names))
            raise Refusal(f"{folder} has no checkpoint of step {step}. It has the steps {there}.")
        names = [files.step_name(step)]
    checked, faults = [], []
    for number, name in enumerate(reversed(names)):
        try:
            manifest = files.verify(folder / name, progress=lambda share, done=number: progress((done + share) / len(names)))  # type: ignore[misc]
        except BadCheckpoint as fault:
            faults.append(f"Checkpoint {folder / name} is not whole: {fault}.")
            continue
        if unsafe := unsafe_files(folder / name, manifest):
            refuse_unsafe(folder / name, unsafe)
        checked.append({"step": manifest.step, "files": len(manifest.files), "bytes": sum(entry.bytes for entry in manifest.files)})
    if faults:
        whole = ", ".join(str(entry["step"]) for entry in checked) or "none"
        raise Refusal(
            f"{' '.join(faults)} Whole: {whole}. --resume leaves a damaged checkpoint out and takes the newest whole one; to mend one, put "
            f"back a copy of what is damaged."
        )
    return {"run": str(run), "checkpoints": checked}


def _names(run: Path) -> list[str]:
    names = files.checkpoints(run / CHECKPOINTS)
    if not names:
        raise Refusal(f"There are no checkpoints in {run / CHECKPOINTS}. Give the folder that `attractor train` wrote (run.dir).")
    return names


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _losses(path: Path) -> dict[int, float]:
    """By step, of a JSON Lines file, the last of an evaluation's; lines that say none, as one that is still being written, are left out."""
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line, parse_constant=lambda _: None)
            loss = record["loss"]
            losses[int(record["step"])] = float(list(loss.values())[-1] if isinstance(loss, dict) else loss)
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return losses
