"""The published TRM code (arXiv 2510.04871), imported from a checkout beside this one and stepped as its own trainer steps it.

Nothing of it is part of this project. From the checkout come models.recursive_reasoning.trm (the model, with its carry and halting),
models.losses (the loss head) and models.sparse_embedding (the optimizer of puzzle embeddings). What stands in for the rest is listed in
`replaced`: torch's AdamW for AdamATan2, as on our side, and, if einops is not installed, its one use by a transposition.

With train.compile=true the whole model is compiled, as its trainer does by default.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.reasoning.config import ReasonerConfig
from model.reasoning.cost import count_reasoner
from pretrain.errors import Refusal
from pretrain.reasoning.config import PuzzleRecipe

NEEDED = ("models/recursive_reasoning/trm.py", "models/losses.py", "models/sparse_embedding.py")


def refuse_no_checkout(folder: Path) -> None:
    """Raises Refusal when the folder does not hold the published code."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise Refusal(
            f"--against {folder} is no checkout of the published TRM code: it lacks {missing[0]}. Clone "
            "github.com/SamsungSAILMontreal/TinyRecursiveModels and give its folder."
        )


class Published:
    """Its model in training. For a process of its own: the modules are called `models` and stay imported."""

    def __init__(self, folder: Path, recipe: PuzzleRecipe, puzzles: tuple[Tensor, Tensor, Tensor], device: torch.device) -> None:
        self.replaced = ["AdamATan2 by AdamW"]
        inputs, answers, identifiers = puzzles
        self.rows = inputs.shape[0]
        self.batch = {"inputs": inputs.int(), "labels": answers.int(), "puzzle_identifiers": identifiers.int()}
        with torch.device(device):
            model, sparse = self._import(folder, recipe)
            self.carry = model.initial_carry(self.batch)
        self._refuse_other_size(model, recipe)
        self.device, self.looked = device, self.carry
        self.inner: torch.nn.Module = model
        self.model: Any = torch.compile(model) if recipe.train.compile else model
        settings = recipe.optimizer
        table = model.model.puzzle_emb.buffers()
        self.optimizers = [
            sparse(table, world_size=1, lr=settings.puzzle_lr, weight_decay=settings.puzzle_weight_decay),
            torch.optim.AdamW(
                model.parameters(),
                lr=settings.lr,
                betas=(settings.betas[0], settings.betas[1]),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=device.type == "cuda",
            ),
        ]

    def step(self) -> None:
        self.inner.train()
        self.carry, loss, _, _, _ = self.model(return_keys=[], carry=self.carry, batch=self.batch)
        (loss / self.rows).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def look(self) -> None:
        """An evaluation step of fresh puzzles, as its `evaluate` takes sixteen of."""
        self.inner.eval()
        with torch.inference_mode():
            self.looked, *_ = self.model(return_keys=[], carry=self.looked, batch=self.batch)

    def _import(self, folder: Path, recipe: PuzzleRecipe) -> tuple[Any, Any]:
        """(its loss head around its model, its optimizer class of puzzle embeddings)."""
        if importlib.util.find_spec("einops") is None:
            sys.modules["einops"] = _transposing()
            self.replaced.append("einops.rearrange by torch.transpose")
        sys.path.insert(0, str(folder.resolve()))
        try:
            trm, losses, sparse = (importlib.import_module(name.removesuffix(".py").replace("/", ".")) for name in NEEDED)
        except ImportError as error:
            raise Refusal(
                f"The published code in {folder} cannot be imported ({error}): install what it needs, or leave --against out."
            ) from error
        finally:
            sys.path.pop(0)
        model = trm.TinyRecursiveReasoningModel_ACTV1(_arguments(recipe, self.rows))
        head = losses.ACTLossHead(model, f"{recipe.supervision.loss}_cross_entropy")
        return head, sparse.CastedSparseEmbeddingSignSGD_Distributed

    def _refuse_other_size(self, model: Any, recipe: PuzzleRecipe) -> None:
        ours = count_reasoner(recipe.architecture).total - recipe.model.identifiers * recipe.model.width  # a buffer there
        theirs = sum(parameter.numel() for parameter in model.parameters())
        if ours != theirs:
            raise Refusal(
                f"The published code has {theirs} parameters at the shape of {recipe.run.name!r}, ours {ours} (puzzle embeddings apart): "
                "leave model.mlp_width and model.mixing_width at the published rule, or leave --against out."
            )


def _arguments(recipe: PuzzleRecipe, rows: int) -> dict[str, Any]:
    """The published names of what section `model` says."""
    m: ReasonerConfig = recipe.model
    return {
        "batch_size": rows,
        "seq_len": m.cells,
        "vocab_size": m.vocabulary_size,
        "num_puzzle_identifiers": m.identifiers,
        "puzzle_emb_ndim": m.width,
        "puzzle_emb_len": m.prefix,
        "H_cycles": m.outer_cycles,
        "L_cycles": m.inner_cycles,
        "H_layers": 0,
        "L_layers": m.layers,
        "hidden_size": m.width,
        "expansion": 4,
        "num_heads": m.heads,
        "pos_encodings": m.positions,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_base,
        "mlp_t": m.mixing == "mlp",
        "halt_max_steps": recipe.supervision.steps,
        "halt_exploration_prob": recipe.supervision.exploration,
        "no_ACT_continue": recipe.supervision.halting == "halt",
        "forward_dtype": "bfloat16" if recipe.train.precision == "bf16" else "float32",
    }


def _transposing() -> types.ModuleType:
    """A module `einops` that knows the swap of the two inner dimensions of four, which is what the published attention asks of it."""

    def rearrange(x: Tensor, pattern: str) -> Tensor:
        before, after = (side.split() for side in pattern.split("->"))
        if len(before) != 4 or after != [before[0], before[2], before[1], before[3]]:
            raise Refusal(f"The published code asks einops for {pattern!r}, which has no stand-in: install einops.")
        return x.transpose(1, 2)

    module = types.ModuleType("einops")
    module.rearrange = rearrange  # type: ignore[attr-defined]
    return module
