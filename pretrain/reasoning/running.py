"""The puzzles under way: rows of a global batch that outlive a step, which rank holds them, and where the next puzzle comes from.

    rows 0 ... B - 1 of the global batch, dealt out contiguously: data rank, then micro-batch, then row
    the k-th halted row of the global batch takes position p + k of the stream; then p grows by the number of halted rows

So which puzzle a row takes does not depend on the layout. What a rank needs to know for it is how many rows halted in each micro-batch of
the run: one small table, which a step gathers with its other numbers. How long a row must stay at least (exploration) is a function of
(train.seed, step, row of the global batch). Random starts and path noise (model.start, model.path_noise) come from the rank's generator:
they are resumed to the bit on the same layout, and differ on another.

A checkpoint keeps all rows in global order in carry.safetensors: latents in the precision of the network, so nothing is rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.puzzles import PuzzleStream
from model.reasoning.reasoner import Reasoner
from model.reasoning.supervision import Carry, empty_carry, explore, refill
from pretrain.errors import Refusal
from pretrain.mesh import Mesh
from pretrain.reasoning.config import PuzzleRecipe
from pretrain.tensor_files import TensorFiles, holds

CARRY = "carry"
"""The stem of its tensors in a checkpoint (pretrain/tensor_files.py)."""
_GRIDS = ("inputs", "answers", "identifiers", "steps", "halted")


class Running:
    """This rank's rows, a Carry a micro-batch, and the place of the whole run in the stream. All rows begin halted."""

    def __init__(
        self, recipe: PuzzleRecipe, model: Reasoner, stream: PuzzleStream, device: torch.device, mesh: Mesh, accumulation: int
    ) -> None:
        self.model, self.stream, self.device, self.mesh, self.accumulation = model, stream, device, mesh, accumulation
        self.seed, self.supervision = recipe.train.seed, recipe.supervision
        self.rows, self.micro = recipe.train.global_batch, recipe.train.micro_batch
        self.carries = [empty_carry(model.start(self.micro), recipe.cells) for _ in range(accumulation)]
        self.position = 0
        """Of the first puzzle of the stream that no row has taken."""
        self.halted = [self.micro] * (self.rows // self.micro)
        """Rows to be replaced, by micro-batch of the global batch."""

    def refill(self) -> None:
        """Halted rows take their puzzles, and nothing is left halted."""
        first = self.mesh.where.data * self.accumulation
        for own, carry in enumerate(self.carries):
            if wanted := self.halted[first + own]:
                self.carries[own] = self._replaced(carry, self.position + sum(self.halted[: first + own]), wanted)
        self.position += sum(self.halted)
        self.halted = [0] * len(self.halted)

    def _replaced(self, carry: Carry, start: int, wanted: int) -> Carry:
        fresh = self.stream.read(start, wanted)
        inputs, answers, identifiers = (self._whole(column) for column in (fresh.inputs, fresh.answers, fresh.identifiers))
        return refill(carry, inputs, answers, identifiers, self.model.start(self.micro))

    def _whole(self, column: Tensor) -> Tensor:
        """As many rows as a micro-batch has, on the device; those added are not looked at."""
        padded = column.new_zeros((self.micro, *column.shape[1:]))
        padded[: len(column)] = column
        return self._sent(padded)

    def _sent(self, host: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def least_steps(self, number: int) -> list[Tensor]:
        """For optimizer step `number`, by micro-batch [micro] int32: with probability supervision.exploration a number from 2 to
        supervision.steps below which a row may not halt, else 0."""
        draws = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        least = explore(torch.from_numpy(draws.random((2, self.rows))), self.supervision)
        share = self.rows // self.mesh.layout.data
        own = least[self.mesh.where.data * share :][:share].contiguous()
        return list(self._sent(own).split(self.micro))

    def state(self) -> dict[str, Any]:
        """As plain values, the same on all ranks: what `resume` wants back."""
        return {"position": self.position, "stream": self.stream.identity()}

    def tensors(self) -> dict[str, Tensor]:
        """All rows of the run in global order, on the CPU of rank 0; nothing on other ranks. Collective."""
        columns = {f"latents.{i}": [carry.latents[i] for carry in self.carries] for i in range(len(self.carries[0].latents))}
        columns |= {name: [getattr(carry, name) for carry in self.carries] for name in _GRIDS}
        whole = {name: _on_rank_0(torch.cat(parts).contiguous(), self.mesh) for name, parts in columns.items()}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    def resume(self, state: dict[str, Any], checkpoint: Path) -> list[str]:
        """Goes on where `state` and the checkpoint's rows stand; without rows (a checkpoint of no run of this kind) they start anew, which
        the sentence returned says. Raises Refusal for other puzzles than those that `state` knows."""
        known, present = state["stream"], self.stream.identity()
        if differing := [f"{key}: {known.get(key)} then, {value} now" for key, value in present.items() if known.get(key) != value]:
            raise Refusal(
                f"{checkpoint} was trained on other puzzles than data.path holds ({'; '.join(differing)}): give the set it began with, or "
                f"begin another run (run.dir)."
            )
        self.position = int(state["position"])
        if not holds(checkpoint, CARRY):
            return [f"{checkpoint} holds no puzzles under way ({CARRY}.safetensors): all {self.rows} rows take new ones."]
        with TensorFiles(checkpoint, CARRY) as stored:
            self._take(stored, checkpoint)
        return []

    def _take(self, stored: TensorFiles, checkpoint: Path) -> None:
        share, first = self.accumulation * self.micro, self.mesh.where.data * self.accumulation * self.micro
        like = self.carries[0]
        names = {f"latents.{i}": latent for i, latent in enumerate(like.latents)} | {name: getattr(like, name) for name in _GRIDS}
        wanted = {name: (self.rows, *column.shape[1:]) for name, column in names.items()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.shapes.items()}
        if found != wanted:
            raise Refusal(
                f"{CARRY}.safetensors in {checkpoint} does not hold the rows of this run: {found}, where {wanted} is wanted. Take another "
                f"checkpoint."
            )
        own = {name: stored.read_rows(name, first, first + share).to(self.device) for name in wanted}
        self.carries = [
            Carry(tuple(own[f"latents.{i}"][rows] for i in range(len(like.latents))), *(own[name][rows] for name in _GRIDS))
            for rows in (slice(k * self.micro, (k + 1) * self.micro) for k in range(self.accumulation))
        ]
        self.halted = stored.read("halted").view(-1, self.micro).sum(1).tolist()


def _on_rank_0(own: Tensor, mesh: Mesh) -> Tensor | None:
    """The rows of all data ranks, joined. What has no elements, the latents of a transformer, does not travel."""
    if mesh.rank:
        if own.numel():
            dist.send(own.view(torch.uint8), 0)
        return None
    parts = [own.cpu()]
    for other in range(1, mesh.layout.data):
        received = torch.empty_like(own)
        if own.numel():
            dist.recv(received.view(torch.uint8), other)
        parts.append(received.cpu())
    return torch.cat(parts)
