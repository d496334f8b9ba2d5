"""The model as DeepSpeed's PipelineModule: one stage's layers on this rank, everything else on the meta device.

    (tokens, targets, documents) -> embedding -> block 0 ... block n-1 -> tail: what is solved or looped, final norm, unembedding -> loss

Each layer takes and gives (x, tokens, targets, documents): what makes the mask, looks up value embeddings and is predicted travels with
the activations, so every stage sees the same document boundaries and positions, and only the first reads data. Without masked
documents a single zero stands for them. The attractor, or a loop and its coda, is whole on the last stage; the tied table is on the
first and the last, its gradients added up once a step by DeepSpeed.

The loss is the module's output, not DeepSpeed's `loss_fn` of it: under bf16 the engine (0.19.8) clears gradients when backward reaches
the module's output, so parameters used after it (the unembedding, at least) would silently never train.

Layers are the LanguageModel's own modules, so parameters keep their canonical names and roles, and a stage's first weights are those of
the whole model. What each micro-batch's loss found is kept in `found` on the last stage.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from data_pipeline import Batch
from model.attention import make_context
from model.init import initialise, materialise
from model.language_model import LanguageModel
from model.loss import IGNORE
from model.refine import Depth
from pretrain.mesh import Mesh
from pretrain.partition import Stage
from pretrain.step import Found, to_device

Marks = tuple[Tensor, Tensor, Tensor]
"""tokens [b, s], targets [b, s], documents [b, s], or [1] where attention crosses them."""
Traveller = tuple[Tensor, Tensor, Tensor, Tensor]
"""x [b, s, w] (this rank's tokens), and the marks."""


def stage_modules(model: LanguageModel, stages: Sequence[Stage], pipe: int) -> list[nn.Module]:
    """What stage `pipe` holds of a model."""
    first, last, stage = pipe == 0, pipe == len(stages) - 1, stages[pipe]
    tables = model.backbone.value_embeddings
    held: list[nn.Module | None] = list(model.backbone.blocks[stage.first : stage.stop])
    held += [tables[str(layer)] for layer in range(stage.first, stage.stop) if str(layer) in tables]
    held += [model.embedding] if first or (last and model.head is None) else []
    held += [model.refine, model.norm, model.head] if last else []
    return [module for module in held if module is not None]


def stage_names(model: LanguageModel, stages: Sequence[Stage], pipe: int) -> list[str]:
    """Canonical names of the parameters that stage `pipe` holds, in the model's order."""
    held = {id(parameter) for module in stage_modules(model, stages, pipe) for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in held]


def materialise_stage(model: LanguageModel, stages: Sequence[Stage], pipe: int, device: torch.device, seed: int) -> None:
    """Gives stage `pipe` of a model on the meta device its first weights; the rest stays there and is not trained here."""
    for module in stage_modules(model, stages, pipe):
        materialise(module, device)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.is_meta)
    initialise(model, seed)


class _Embed(nn.Module):
    """The tied layer: by itself first in the pipeline, as the table of the unembedding last."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, marks: Marks) -> Traveller:
        return self.embedding(marks[0]), *marks


class _Block(nn.Module):
    """One backbone block, with its value embedding."""

    def __init__(self, model: LanguageModel, layer: int) -> None:
        super().__init__()
        tables = model.backbone.value_embeddings
        self.held = nn.ModuleList([model.backbone.blocks[layer], *([tables[str(layer)]] if str(layer) in tables else [])])
        self.config = model.config.model
        self.apply_layer: Callable[..., Tensor] = model.backbone.layer
        self.layer = layer

    def forward(self, inputs: Traveller) -> Traveller:
        x, tokens, targets, documents = inputs
        context = make_context(self.config, tokens, documents if documents.ndim == 2 else None)
        return self.apply_layer(self.layer, x, context), tokens, targets, documents


class _Tail(nn.Module):
    """Holds what is solved or looped, the final norm and an untied unembedding; `Stages.finish` uses them."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.held = nn.ModuleList(module for module in (model.refine, model.norm, model.head) if module is not None)

    def forward(self, inputs: Traveller) -> Traveller:
        return inputs


class Stages(PipelineModule):
    """`model` as a pipeline over the mesh. depths: None to train, else what the next batches are evaluated at."""

    def __init__(self, model: LanguageModel, stages: Sequence[Stage], mesh: Mesh) -> None:
        self._bounds = [0, *(1 + stage.stop for stage in stages[:-1]), len(model.backbone.blocks) + 3]
        self.found: list[Found] = []
        self.depths: Sequence[Depth] | None = None
        blocks = [_Block(model, layer) for layer in range(len(model.backbone.blocks))]
        first: Any = _Embed(model.embedding)
        last: Any = self.finish
        if model.head is None:
            first = _Built("embedding", first, None)
            last = _Built("embedding", first.module, lambda _, inputs: self.finish(inputs))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition and its seeds
            super().__init__([first, *blocks, _Tail(model), last], topology=mesh.grid.topology())
        object.__setattr__(self, "model", model)  # not a submodule: its layers already are
        self.stages = list(stages)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Ours (pretrain.partition), in place of DeepSpeed's by parameters."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """DeepSpeed's, outside autograd, which would otherwise record a broadcast in the table's history."""
        super()._synchronize_tied_weights()

    def take_found(self) -> list[Found]:
        """What the losses found since the last call: nothing on any stage but the last."""
        found, self.found = self.found, []
        return found

    def finish(self, inputs: Traveller) -> Tensor:
        """The weighted loss of one micro-batch (see pretrain.step), on the last stage."""
        x, tokens, targets, documents = inputs
        context = make_context(self.model.config.model, tokens, documents if documents.ndim == 2 else None)
        loss, record = self.model.finish(x, context, targets, self.depths)
        self.found.append((loss.detach(), targets, record))
        return loss * ((targets != IGNORE).sum() / targets.numel())


def pairs(batches: Iterable[Batch], device: torch.device, mask_documents: bool) -> Iterator[tuple[Marks, Tensor]]:
    """Batches as DeepSpeed's pipeline reads them on its first stage: (inputs, labels), of which the labels are not used."""
    for batch in batches:
        tokens, targets, documents = to_device(batch, device, mask_documents)
        yield (tokens, targets, tokens.new_zeros(1) if documents is None else documents), targets


def feed(engine: Any, batches: Iterable[Batch], mask_documents: bool) -> Iterator[Any]:
    """What this stage's engine draws from: batches on the first, nothing of meaning on the last, which is asked as well."""
    return (
        pairs(batches, engine.device, mask_documents) if engine.is_first_stage() else repeat((None, torch.zeros((), device=engine.device)))
    )


def evaluate_batches(engine: Any, batches: Iterable[Batch], depths: Sequence[Depth], mask_documents: bool) -> Iterator[Found]:
    """What the last stage finds of each batch at `depths`; other stages yield nothing. All ranks call it, with equally many batches."""
    stages, remaining = engine.module, iter(batches)
    stages.depths = depths
    try:
        while chunk := list(islice(remaining, 4 * engine.num_stages)):  # enough to fill the pipeline, few enough to hold
            engine.eval_batch(feed(engine, chunk, mask_documents), reduce_output=None, bcast_loss=False, num_micro_batches=len(chunk))
            yield from stages.take_found()
    finally:
        stages.depths = None


class _Built(TiedLayerSpec):
    """A tied layer that exists already."""

    def __init__(self, key: str, module: nn.Module, forward: Any) -> None:
        super().__init__(key, type(module), forward_fn=forward, tied_weight_attr="embedding.weight")
        self.module = module

    def build(self, log: bool = False) -> nn.Module:
        return self.module
