"""What a reasoning model is, as data: the sections `model` and `supervision` of a recipe with `regime: reasoning`. No torch.

    puzzle --> x = sqrt(width) E[tokens]                         [L, width], L = prefix + cells
    latents y (the answer) and z (the reasoning), refined again and again by one small network that sees x
    logits = head(y) of the cells;  two halting logits from y's first position

Deep supervision calls the model up to `supervision.steps` times on one puzzle, with an optimizer step each; between calls the
latents are carried without gradient. Sections `solver` and `gradient` are those of model/config.py; only kind=attractor reads them.

The records refuse impossible values when they are made, with a ValueError that names the field, the value and the remedy.
Defaults are those of TRM on Sudoku (arXiv 2510.04871) with attention. Sources: TRM; HRM (2506.21734); EqR (2605.21488); Attractor
(2605.12466).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from model.config import GradientConfig, SolverConfig

Kind = Literal["trm", "hrm", "transformer", "attractor"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def published_hidden(channels: int) -> int:
    """Hidden channels of a published SwiGLU: the next multiple of 256 of 8/3 of its channels, rounded."""
    return -(-round(8 * channels / 3) // 256) * 256


@dataclass(frozen=True)
class ReasonerConfig:
    """Section `model`: the network, what it is applied to, and how often."""

    kind: Kind = "trm"
    """trm: one network for both latents. hrm: two, at two time scales, with a one-step gradient. transformer: one pass over the embedded
    puzzle. attractor: trm with the loop over z (or the whole cycle) solved as a fixed point."""
    vocabulary_size: int | None = None
    """Tokens, padding included; None takes it from the prepared puzzles."""
    cells: int | None = None
    """Cells of a grid; None takes them from the prepared puzzles."""
    identifiers: int = 1
    """Rows of the puzzle embedding; Sudoku and mazes have one."""
    width: int = 512
    """Channels of the latents."""
    heads: int = 8
    """Attention heads; width must divide by it, and width / heads must be even under rotary positions."""
    layers: int = 2
    """Blocks of the network; of hrm, of each of its two."""
    mlp_width: int | None = None
    """Hidden channels of the SwiGLU; None is the published rule: the next multiple of 256 of 8/3 width."""
    mixing: Literal["attention", "mlp"] = "attention"
    """What mixes positions. mlp: a SwiGLU over the L positions, the same for every channel."""
    mixing_width: int | None = None
    """Hidden size of that SwiGLU; None is the published rule: the next multiple of 256 of 8/3 L."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """How attention tells positions apart; a mixing MLP knows them by itself."""
    prefix: int = 16
    """Positions before the grid; the puzzle embedding fills the first. 0: none, and no puzzle embedding (EqR)."""
    outer_cycles: int = 3
    """Cycles of a supervision step, each ending in an update of y; all but the last run without gradient. With solve=yz: not read."""
    inner_cycles: int = 6
    """Updates of z in a cycle. attractor with solve=z: not read, since the solver's section says."""
    solve: Literal["z", "yz"] = "z"
    """attractor: the state of the map. z: y stands still. yz: one whole cycle, inner_cycles updates of z and one of y, is the map."""
    start: Literal["fixed", "random"] = "fixed"
    """fixed: every position starts at the same two vectors. random: latents are drawn for every puzzle anew (EqR)."""
    start_std: float = 1.0
    """Standard deviation of a random start."""
    path_noise: float = 0.0
    """Standard deviation of the noise added to every update in training (EqR: .01)."""
    step_size: float = 1.0
    """s of the update z <- (1 - s) z + s net(...) (EqR: .95)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the norms, which have no gain."""

    def __post_init__(self) -> None:
        self._require_sizes()
        self._require_equilibrium_options()

    def _require_sizes(self) -> None:
        for name in ("identifiers", "width", "heads", "layers", "outer_cycles", "inner_cycles"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("mlp_width", "mixing_width", "cells"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name} must be at least 1 or left out, not {value}.")
        _require(
            self.vocabulary_size is None or self.vocabulary_size > 1,
            f"model.vocabulary_size must be above 1 or left out, not {self.vocabulary_size}.",
        )
        _require(self.prefix >= 0, f"model.prefix must not be negative, not {self.prefix}.")
        _require(
            self.prefix > 0 or self.identifiers == 1,
            f"model.identifiers={self.identifiers} needs a position for the puzzle embedding: set model.prefix to 1 or more.",
        )
        if self.mixing == "attention":
            _require(
                self.width % self.heads == 0 and (self.positions != "rope" or self.head_dim % 2 == 0),
                f"model.width={self.width} must be a multiple of model.heads={self.heads}, with rotary positions an even one.",
            )
            _require(self.mixing_width is None, f"model.mixing_width={self.mixing_width} belongs to model.mixing=mlp: leave it out.")
        else:
            _require(
                self.positions != "rope",
                "model.positions=rope turns queries and keys, which model.mixing=mlp lacks: set model.positions=none, or learned.",
            )
        for name in ("norm_eps", "start_std"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"model.{name} must be above 0, not {value}.")
        _require(math.isfinite(self.rope_base) and self.rope_base > 1, f"model.rope_base must be above 1, not {self.rope_base}.")

    def _require_equilibrium_options(self) -> None:
        _require(self.path_noise >= 0, f"model.path_noise must be 0 (off) or above, not {self.path_noise}.")
        _require(0 < self.step_size <= 1, f"model.step_size must lie in (0, 1], not {self.step_size}.")
        for name, off in (("start", "fixed"), ("path_noise", 0.0), ("step_size", 1.0)):
            value = getattr(self, name)
            _require(
                value == off or self.kind in ("trm", "attractor"),
                f"model.{name}={value} is for model.kind=trm or attractor, not {self.kind}: leave it out.",
            )
        _require(
            self.solve == "z" or self.kind == "attractor",
            f"model.solve={self.solve} is for model.kind=attractor, not {self.kind}: leave it out.",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def length(self) -> int:
        """L: the positions the network sees. Raises ValueError while model.cells is open."""
        if self.cells is None:
            raise ValueError("model.cells must be set: the prepared puzzles say how many there are.")
        return self.prefix + self.cells

    @property
    def hidden(self) -> int:
        """Hidden channels of the SwiGLU over channels."""
        return published_hidden(self.width) if self.mlp_width is None else self.mlp_width

    @property
    def mixing_hidden(self) -> int:
        """Hidden size of the SwiGLU over positions."""
        return published_hidden(self.length) if self.mixing_width is None else self.mixing_width

    @property
    def networks(self) -> int:
        """Networks of `layers` blocks each."""
        return 2 if self.kind == "hrm" else 1

    @property
    def solves(self) -> bool:
        """Whether the sections solver and gradient are read."""
        return self.kind == "attractor"


@dataclass(frozen=True)
class SupervisionConfig:
    """Section `supervision`: how often a puzzle is looked at, when it is done, and the loss."""

    steps: int = 16
    """Supervision steps a puzzle stays at most."""
    exploration: float = 0.1
    """Share of rows that, at each step, may not halt before a number of steps drawn from 2 ... steps."""
    halting: Literal["halt", "q_learning"] = "halt"
    """halt: a puzzle is done when its halting logit is above 0. q_learning: when it is above the continue logit, which learns the value
    of going on from one further forward pass without gradient (HRM)."""
    loss: Literal["stablemax", "softmax"] = "stablemax"
    """What turns logits into probabilities of the tokens of a cell."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"supervision.steps must be at least 1, not {self.steps}.")
        _require(0 <= self.exploration <= 1, f"supervision.exploration must lie in 0 ... 1, not {self.exploration}.")


@dataclass(frozen=True)
class ReasoningConfig:
    """The four sections together: all that `model.reasoning.reasoner.build` needs."""

    model: ReasonerConfig = field(default_factory=ReasonerConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)

    def __post_init__(self) -> None:
        _require(
            self.model.kind != "transformer" or self.supervision.steps == 1,
            f"supervision.steps={self.supervision.steps} is for models that carry latents: model.kind=transformer would only see the same "
            "puzzle again. Set supervision.steps=1.",
        )
        _require(
            self.solver.start in (None, "zero"),
            f"solver.start={self.solver.start}: a reasoner's solve starts at the latents of the step before. Leave it out, or take zero.",
        )

        _require(
            self.gradient.mode in ("one_step", "phantom"),
            f"gradient.mode={self.gradient.mode} is for language models: a reasoner takes phantom, or one_step.",
        )

    @property
    def applications(self) -> int:
        """Applications of the map that follow a solve: k of phantom-k, else 1."""
        return self.gradient.steps if self.gradient.mode == "phantom" else 1
