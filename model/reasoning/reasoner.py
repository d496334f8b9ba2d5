"""A reasoner: the embedded puzzle, the recurrence of its kind over the latents, two heads.

    x = sqrt(w) [P(identifier), 0, ..., 0; E(inputs)]                        [b, L, w], L = prefix + cells
        (learned positions: (... + positions) / sqrt(2))
    latents, y = kind(latents, x)
    logits = y[cells] W_head^T                 [b, cells, v]
    q_halt, q_continue = W_halting y[0] + b    [b], at least fp32

One call is one supervision step: gradients pass through its last cycle alone, and the latents it returns carry none. With gradients off,
`iterations` sets the inner loops: evaluation without the solver is 0 of them.

A fixed start is no parameter and no buffer: two vectors drawn from a seed of their own and kept a width and device, as rotary tables are,
so that parameters are the whole state of a model. A random start is drawn at every reset (EqR).

Shapes: inputs [b, cells] tokens of any integer type, identifiers [b].
Sources: TRM (arXiv 2510.04871), HRM (2506.21734), EqR (2605.21488).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn import functional as F

from model.reasoning.attractor import Attractor
from model.reasoning.blocks import Network, Tables
from model.reasoning.config import ReasoningConfig
from model.reasoning.hrm import HRM
from model.reasoning.thinking import Asked, Latents
from model.reasoning.transformer import Transformer
from model.reasoning.trm import TRM
from model.reasoning.weights import initialise, truncated_normal
from model.rotary import rotary_tables

KINDS: dict[str, type[TRM] | type[HRM] | type[Transformer] | type[Attractor]] = {
    "trm": TRM,
    "hrm": HRM,
    "transformer": Transformer,
    "attractor": Attractor,
}
_START_SEED = 2510_04871  # of the fixed start vectors; any number, but always the same


class Thought(NamedTuple):
    """What one supervision step gives."""

    latents: Latents
    """Where the next step begins; without gradient."""
    logits: Tensor
    """[b, cells, v]."""
    q_halt: Tensor
    """[b], at least fp32: above 0 says that the grid is right."""
    q_continue: Tensor
    """[b], at least fp32: the value of going on, which q_learning trains."""
    penalty: Tensor | None
    """Weighted; None where there is none."""
    record: dict[str, Tensor]
    """Scalars on the model's device. Always: solver_evaluations and applications, the network's applications a sequence without and with
    gradient. Of a solver: solver_iterations, solver_converged (means), solver_residual (the worst), solver_fallbacks."""
    residual: Tensor
    """[b] fp32: ||new - old|| / ||new|| of the latents over this step."""


class Reasoner(nn.Module):
    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__()
        m = config.model
        if m.vocabulary_size is None:
            raise ValueError("model.vocabulary_size must be set: the prepared puzzles say how many tokens there are.")
        self.config, length = config, m.length
        self.embedding = nn.Embedding(m.vocabulary_size, m.width)
        self.puzzle_embedding = nn.Embedding(m.identifiers, m.width) if m.prefix else None
        self.positions = nn.Embedding(length, m.width) if m.positions == "learned" else None
        self.core = KINDS[m.kind](config)
        self.head = nn.Linear(m.width, m.vocabulary_size, bias=False)
        self.halting = nn.Linear(m.width, 2)

    def start(self, rows: int, generator: torch.Generator | None = None) -> Latents:
        """The first latents of so many puzzles. A random start is drawn on the generator's device; a fixed one is a view."""
        m, weight = self.config.model, self.embedding.weight
        if not self.core.latents:
            return (weight.new_empty(rows, 0, m.width),)
        shape = (self.core.latents, rows, m.length, m.width)
        if m.start == "random":
            device = weight.device if generator is None else generator.device
            return tuple(truncated_normal(shape, m.start_std, device, generator).to(weight.device, weight.dtype).unbind())
        vectors = _start_vectors(self.core.latents, m.width, weight.device).to(weight.dtype)
        return tuple(vectors[:, None, None].expand(shape).unbind())

    def forward(self, latents: Latents, inputs: Tensor, identifiers: Tensor, iterations: int | None = None) -> Thought:
        """One supervision step. iterations: of each inner loop or solve, with gradients off alone (else ValueError); None as configured."""
        m = self.config.model
        differentiated = torch.is_grad_enabled()
        if iterations is not None and differentiated:
            raise ValueError(f"iterations={iterations} is for evaluation: call the reasoner under torch.no_grad(), or leave it out.")
        x = self._embed(inputs, identifiers)
        asked = Asked(self._tables(x), iterations, m.path_noise if differentiated else 0.0)
        thinking = self.core(latents, x, asked)
        q = self.halting(thinking.answer[:, 0])
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        new = tuple(latent.detach() for latent in thinking.latents)
        counts = {"solver_evaluations": thinking.evaluations, "applications": thinking.applications}
        record = {name: torch.full((), count, device=x.device) for name, count in counts.items()} | thinking.record
        logits = self.head(thinking.answer)[:, m.prefix :]
        return Thought(new, logits, q[:, 0], q[:, 1], thinking.penalty, record, _change(latents, new))

    def compile_maps(self) -> None:
        """torch.compile in place every network; loops and solvers stay outside."""
        for module in self.modules():
            if isinstance(module, Network):
                module.compile()

    def _embed(self, inputs: Tensor, identifiers: Tensor) -> Tensor:
        m, dtype = self.config.model, self.embedding.weight.dtype
        x = _looked_up(self.embedding, inputs.int())
        if self.puzzle_embedding is not None:
            puzzle = _looked_up(self.puzzle_embedding, identifiers)[:, None]
            x = torch.cat((F.pad(puzzle, (0, 0, 0, m.prefix - 1)), x), dim=1)
        scale = math.sqrt(m.width)
        if self.positions is not None:
            x, scale = x + self.positions.weight, scale / math.sqrt(2)  # the sum of two varies as much as one
        return (x * scale).to(dtype)

    def _tables(self, x: Tensor) -> Tables:
        m = self.config.model
        if m.positions != "rope":
            return None
        cos, sin = rotary_tables(m.length, m.head_dim, m.rope_base, x.device)
        return cos.to(x.dtype), sin.to(x.dtype)


def _looked_up(table: nn.Embedding, rows: Tensor) -> Tensor:
    """In at least fp32, so that its gradient is summed there: a row of a dozen is read at each of 60,000 cells, and a sum in bf16 stops."""
    return F.embedding(rows, table.weight.to(torch.promote_types(table.weight.dtype, torch.float32)))


@torch.no_grad()
def _change(old: Latents, new: Latents) -> Tensor:
    """||new - old|| / ||new|| of each row over all latents; 0 where there are none."""

    def squares(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32)).square()

    if not new[0].shape[1]:
        return torch.zeros(new[0].shape[0], device=new[0].device)
    changed = torch.stack([squares(b - a) for a, b in zip(old, new, strict=True)]).sum(0)
    size = torch.stack([squares(b) for b in new]).sum(0)
    return (changed / size.clamp_min(1e-30)).sqrt().float()


def _start_vectors(count: int, width: int, device: torch.device) -> Tensor:
    """[count, width] fp32, truncated normal of standard deviation 1, always the same."""
    if detect_fake_mode() is not None:  # traced for shapes: a fake table must not be kept
        return _drawn_vectors.__wrapped__(count, width, device)
    return _drawn_vectors(count, width, device)


@lru_cache(maxsize=16)
def _drawn_vectors(count: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(_START_SEED)
        return truncated_normal((count, width), 1.0, torch.device("cpu"), generator).to(device)


def build(config: ReasoningConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Reasoner:
    """A reasoner with its first weights, which the seed decides, whatever the device. On the meta device it has shapes only."""
    device = torch.device(device)
    with torch.device("meta"):
        model = Reasoner(config)
    if device.type != "meta":
        model.to_empty(device=device)
        initialise(model, seed)
    return model.to(dtype)
