"""A checkpoint of any layout into a fresh engine of another: every rank takes its own elements of weights and optimizer state.

    for every master of this rank, for every piece of it: rows from the checkpoint -> this tensor rank's shard of them -> the piece

All values are fp32 on both sides and none is computed with, so what is learnt does not change; what may is the order in which ranks add
up. Padding is zero. Where the checkpoint has weights alone, the optimizer starts afresh. Collective, and refused on all ranks or on none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from pretrain.agreement import gather
from pretrain.checkpoint_files import CheckpointManifest
from pretrain.errors import Refusal
from pretrain.loaded import refuse_other_tensors
from pretrain.pieces import Held, Pieces
from pretrain.stored import STEP, WEIGHT, Stored, open_stored, rows_of
from pretrain.zero import client_optimizer, masters, publish


@torch.no_grad()
def adopt(engine: Any, pieces: Pieces, folder: Path, manifest: CheckpointManifest) -> bool:
    """Fills masters, optimizer state and module of `engine`, of which this rank holds `pieces`, from a verified checkpoint.

    Returns whether there was optimizer state. Raises Refusal for the tensors of another model, and for a checkpoint that does not add up.
    """
    fault, trained = "", False
    try:
        with open_stored(folder, manifest) as stored:
            _refuse_other_model(pieces, stored, folder)
            trained = any(len(stored.slots(name)) > 1 for name in stored.shapes)
            for master, held, group in zip(masters(engine), pieces.masters, _groups(engine), strict=True):
                _fill(master.data, WEIGHT, held, stored)
                if trained:
                    _fill_state(client_optimizer(engine), master, group, held, stored, folder)
    except Refusal as error:
        fault = str(error)
    if said := next((text for text in gather(fault) if text), ""):
        raise Refusal(said)
    publish(engine)
    return trained


def _groups(engine: Any) -> list[dict[str, Any]]:
    """The parameter group of every master."""
    wrapper, groups = engine.optimizer, client_optimizer(engine).param_groups
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return [groups[wrapper.sub_group_to_group_id[index]] for index in range(len(wrapper.fp16_groups))]
    return [group for group in groups for _ in group["params"]]


def _refuse_other_model(pieces: Pieces, stored: Stored, folder: Path) -> None:
    wanted = {name: torch.nn.Parameter(torch.empty(shape, device="meta")) for name, shape in pieces.shapes.items()}
    refuse_other_tensors(wanted, {name: torch.empty(shape, device="meta") for name, shape in stored.shapes.items()}, folder)


def _fill(master: Tensor, slot: str, pieces: list[Held], stored: Stored) -> None:
    """One slot of a master, flat or in the shape of its parameter."""
    flat = torch.zeros(master.numel())
    for held in pieces:
        flat[held.offset : held.offset + held.stop - held.start] = _values(held, slot, stored)
    master.copy_(flat.view(master.shape))


def _fill_state(optimizer: Any, master: Tensor, group: dict[str, Any], pieces: list[Held], stored: Stored, folder: Path) -> None:
    optimizer.state.pop(master, None)
    optimizer.make_state([master], group)
    state, steps = optimizer.state[master], set()
    for held in pieces:
        kept = set(stored.slots(held.name)) - {WEIGHT}
        if kept != state.keys():
            raise Refusal(
                f"The checkpoint {folder} keeps {_list(kept)} of {held.name}, and this run's optimizer keeps {_list(set(state))}: it "
                f"belongs to another recipe, or its optimizer files are not of one checkpoint with its weights."
            )
        if STEP in state:
            steps.add(stored.step(held.name))
    if len(steps) > 1:
        raise Refusal(f"The checkpoint {folder} has parameters of one group at the steps {_list(steps)} of AdamW: no layout cuts that.")
    for slot, value in state.items():
        if slot != STEP:
            _fill(value, slot, pieces, stored)
        elif steps:
            value.fill_(steps.pop())


def _list(values: set[Any]) -> str:
    return ", ".join(map(str, sorted(values))) or "nothing"


def _values(held: Held, slot: str, stored: Stored) -> Tensor:
    """The elements of a piece: a run of its shard's flat order."""
    shape = stored.shapes[held.name]
    if held.dim == 1 and held.shards > 1:
        width = shape[1] // held.shards
        first = held.start // width
        rows = stored.rows(held.name, slot, first, -(-held.stop // width))
        rows = rows[:, held.shard * width : (held.shard + 1) * width].reshape(-1)
        return rows[held.start - first * width : held.stop - first * width]
    width = torch.Size(shape[1:]).numel()
    shift = held.shard * (rows_of(shape) // held.shards) * width
    first = (shift + held.start) // width
    rows = stored.rows(held.name, slot, first, -(-(shift + held.stop) // width)).reshape(-1)
    return rows[shift + held.start - first * width : shift + held.stop - first * width]
