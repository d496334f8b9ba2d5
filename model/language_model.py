"""Embedding -> backbone -> solve -> tied unembedding; with nothing to solve, the Transformer; with a loop, Parcae.

    y0 = backbone(E(x));   y* = f(y*, y0);   logits = norm(y*) E^T;   loss = next-token cross-entropy at y*

What stands between y0 and the final norm is `refine`: Refine for an attractor and a deq, Loop for parcae and looped (whose backbone is
their prelude), None for a Transformer.

Shapes: tokens, targets, documents [b, s] int64; targets hold model.loss.IGNORE where nothing is to be predicted.
Source: arXiv 2605.12466 and its public code; nanochat for value embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Context, make_context
from model.backbone import Backbone
from model.cache import Cache
from model.config import ModelConfig
from model.fixed_point import Solution
from model.layers import Layers, PlainLayers, RMSNorm
from model.looped import Loop
from model.loss import IGNORE
from model.refine import Depth, Refine, Refined

Record = dict[str, Tensor]


class Extended(NamedTuple):
    """What new tokens lead to."""

    logits: Tensor
    """[b, v] fp32, of each row's last token."""
    solution: Solution | None
    """None where nothing was solved or looped."""


class LanguageModel(nn.Module):
    """`refine` is None for a Transformer; `head` is None where the unembedding is tied."""

    def __init__(self, config: ModelConfig, layers: Layers, recompute: bool = False) -> None:
        super().__init__()
        backbone = config.model
        if backbone.vocabulary_size is None:
            raise ValueError("model.vocabulary_size is not set: give it, or take it from the prepared data's manifest.")
        self.config, self.layers = config, layers
        self.embedding = layers.embedding(backbone.vocabulary_size, backbone.width)
        self.backbone = Backbone(backbone, layers, range(config.prelude), recompute)
        self.refine: Refine | Loop | None = None
        if backbone.solves or backbone.loops:
            self.refine = (Refine if backbone.solves else Loop)(config, layers, recompute)
        self.tail = layers.divided() if backbone.solves else layers
        self.norm = RMSNorm(backbone.width, backbone.norm_eps, self.tail)
        self.head = None if backbone.tied_embeddings else layers.column(backbone.width, backbone.vocabulary_size)

    def propose(self, tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, Context]:
        """The proposal y0 [b, s, w], and the context that what follows shares with the backbone."""
        context = make_context(self.config.model, tokens, documents)
        return self.backbone(self.embedding(tokens), context), context

    @property
    def unembedding(self) -> Tensor:
        """[v, w], or this rank's rows of it."""
        return (self.embedding if self.head is None else self.head).get_parameter("weight")

    def forward(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None, depths: Sequence[Depth] | None = None
    ) -> tuple[Tensor, Record]:
        """(mean loss a predicted token, record). The record holds detached scalars: what the step found and what it cost.

        depths: evaluate instead of train, all from one proposal; the loss returned is the last depth's, and the record holds the loss of
        every token, "nll/<depth>" [b, s], and of every sequence "iterations/", (where something is solved) "converged/" and (of an
        attractor) "proposal_distance/<depth>" [b]. A Transformer has the one depth 0, whatever is asked; a loop's depths are its
        iterations.
        """
        proposal, context = self.propose(tokens, documents)
        return self.finish(proposal, context, targets, depths)

    def finish(self, proposal: Tensor, context: Context, targets: Tensor, depths: Sequence[Depth] | None = None) -> tuple[Tensor, Record]:
        """`forward` from the proposal on: what the last stage of a pipeline does."""
        if depths is not None:
            return self._at_depths(proposal, context, targets, depths)
        if self.refine is None:
            return self.predict(proposal, targets), {}
        refined: Refined = self.refine(proposal, context)
        loss = self.predict(refined.output, targets)
        record = {} if refined.solution is None else solver_record(refined.solution)
        record["cross_entropy"] = loss.detach()
        record["applications"] = torch.full((), refined.applications, device=loss.device)
        if refined.products is not None:
            record["products"] = refined.products
        return (loss if refined.penalty is None else loss + refined.penalty), record

    def predict(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy a predicted token, from the final state [b, s, w] (this rank's tokens); the same on all ranks."""
        total = self.tail.cross_entropy_sum(self._normed(hidden), self.unembedding, targets.flatten())
        return total / (targets != IGNORE).sum().clamp_min(1)

    def _normed(self, hidden: Tensor) -> Tensor:
        """All tokens of the final state, normed, as the unembedding takes them [b * s, w]."""
        return self.tail.enter(self.norm(hidden)).flatten(0, 1)

    @torch.no_grad()
    def _at_depths(self, proposal: Tensor, context: Context, targets: Tensor, depths: Sequence[Depth]) -> tuple[Tensor, Record]:
        record: Record = {}
        losses = proposal.new_zeros(())
        for depth in depths if self.refine is not None else (0,):
            refined = self._state(proposal, context, depth)
            losses = self.tail.cross_entropy_tokens(self._normed(refined.output), self.unembedding, targets.flatten())
            record[f"nll/{depth}"] = losses.view_as(targets)
            if refined.solution is not None:
                record[f"iterations/{depth}"] = refined.solution.iterations
                if isinstance(self.refine, Refine):  # a loop has no tolerance to be within
                    record[f"converged/{depth}"] = refined.solution.converged
                if refined.distance is not None:
                    record[f"proposal_distance/{depth}"] = refined.distance
        return losses.sum() / (targets != IGNORE).sum().clamp_min(1), record

    def _state(self, proposal: Tensor, context: Context, depth: Depth) -> Refined:
        return Refined(proposal, None) if self.refine is None else self.refine(proposal, context, depth)

    @torch.no_grad()
    def logits(self, tokens: Tensor, documents: Tensor | None = None, depth: Depth = "auto") -> Tensor:
        """Logits of every position [b, s, v] in fp32 (where the vocabulary is divided: this rank's)."""
        proposal, context = self.propose(tokens, documents)
        state = self._state(proposal, context, depth).output
        return (self.tail.enter(self.norm(state)) @ self.unembedding.T).float()

    @torch.inference_mode()
    def extend(self, tokens: Tensor, cache: Cache, depth: Depth = "auto", lengths: Sequence[int] | None = None) -> Extended:
        """New tokens [b, n] after those of the cache, which then holds them too; of row i the first lengths[i], padding after them.

        Solved as `logits` solves with depth "strict" ("auto" means that too), or with a fixed number of iterations, always the same for
        one cache. Raises ValueError where the tokens do not fit.
        """
        context = cache.begin(self.config.model, tokens, lengths)
        proposal = self.backbone(self.embedding(tokens), context)
        refined = self._state(proposal, context, "strict" if depth == "auto" else depth)
        return Extended((self.norm(cache.advance(refined.output)) @ self.unembedding.T).float(), refined.solution)

    def compile_maps(self, by_block: bool = False) -> None:
        """torch.compile in place the backbone (whole, or each block by itself), and the map f or the looped blocks and those after them;
        the solver's loop stays outside."""
        if self.config.model.solves and self.config.gradient.mode in ("neumann", "adjoint"):
            torch._functorch.config.donated_buffer = False  # their backward goes through the graph of f more than once
        parts: list[nn.Module] = list(self.backbone.blocks) if by_block else [self.backbone]
        if isinstance(self.refine, Refine):
            parts.append(self.refine.attractor)
        elif self.refine is not None:
            parts += [self.refine.core, self.refine.coda]
        for part in parts:
            part.compile()


def solver_record(solution: Solution) -> Record:
    """Scalars of a solve: mean iterations and converged share, the worst residual, evaluations a sequence, fallbacks."""
    batch, device = solution.iterations.shape[0], solution.residual.device
    return {
        "solver_iterations": solution.iterations.float().mean(),
        "solver_evaluations": torch.full((), solution.evaluations / batch, device=device),
        "solver_residual": solution.residual.amax(),
        "solver_converged": solution.converged.float().mean(),
        "solver_fallbacks": solution.fallbacks,
    }


def build(
    config: ModelConfig,
    *,
    layers: Layers | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    recompute: bool = False,
) -> LanguageModel:
    """A model with its first weights. On the meta device it has shapes only."""
    from model.init import initialise, materialise  # imports this module for its types

    device = torch.device(device)
    with torch.device("meta"):
        model = LanguageModel(config, layers or PlainLayers(), recompute)
    if device.type == "meta":
        return model.to(dtype)
    materialise(model, device)
    initialise(model, seed)
    return model.to(dtype)
