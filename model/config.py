"""What a model is, as data: five frozen records that name every choice, and nothing of torch.

Each record is one section of a recipe: `model` (the backbone), `attractor` (the map f), `solver` (how y* = f(y*, y0) is
found), `gradient` (how dL/dtheta is taken at y*), `loop` (blocks that are applied again and again). They refuse impossible values
when they are made, with a ValueError that names the field, the value and the remedy. Defaults are the published ones (arXiv 2605.12466
and its code) unless docs/design.md says why not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["attractor", "transformer", "parcae", "looped", "deq"]
Injection = Literal["additive", "concat", "init_only", "cross_attention"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class BackboneConfig:
    """Section `model`: the causal pre-norm Transformer that proposes y0, and the tied embedding around it."""

    kind: Kind = "attractor"
    """attractor: backbone, then y* = f(y*, y0). transformer: the backbone alone. parcae, looped: its blocks `loop.core` applied again and
    again. deq: backbone, then the equilibrium of a hidden state that the backbone's output drives."""
    vocabulary_size: int | None = None
    """Rows of the embedding; None takes it from the prepared data (rounded up to a multiple of 64)."""
    width: int = 768
    """Channels of the residual stream."""
    heads: int = 6
    """Query heads; width must divide by it, and width / heads must be even (rotary pairs)."""
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None means as many as `heads`."""
    backbone_layers: int = 6
    """Transformer blocks before the attractor; of parcae and looped, all blocks: prelude, core and coda."""
    mlp: Literal["relu2", "swiglu"] = "relu2"
    """relu2: W2 relu(W1 x)^2. swiglu: W2 (silu(Wg x) * W1 x)."""
    mlp_width: int | None = None
    """Hidden channels of the MLP; None means 4 * width."""
    qk_norm: bool = True
    """Parameter-free RMS norm of queries and keys, after the rotary embedding."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm with a gain."""
    value_embeddings: bool = False
    """nanochat's gated value embeddings on every other block, the last included: one vocabulary x kv-width table each."""
    value_gate_channels: int = 32
    """Leading channels of x that feed the gate of a value embedding."""
    tied_embeddings: bool = True
    """The unembedding is the embedding's matrix; False gives it a matrix of its own."""
    zero_output_init: bool = True
    """Backbone output projections start at zero (published); False uses the common std / sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        _require(self.width > 0 and self.heads > 0, f"model.width and model.heads must be positive, not {self.width}, {self.heads}.")
        _require(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0,
            f"model.width={self.width} must be an even multiple of model.heads={self.heads}: choose heads so that width / heads is even.",
        )
        _require(
            self.key_value_heads > 0 and self.heads % self.key_value_heads == 0,
            f"model.kv_heads={self.kv_heads} must be positive and divide model.heads={self.heads}.",
        )
        _require(self.hidden > 0, f"model.mlp_width must be positive, not {self.mlp_width}.")
        _require(math.isfinite(self.rope_base) and self.rope_base > 1, f"model.rope_base must be above 1, not {self.rope_base}.")
        _require(math.isfinite(self.norm_eps) and self.norm_eps > 0, f"model.norm_eps must be above 0, not {self.norm_eps}.")
        _require(
            not self.value_embeddings or 0 < self.value_gate_channels <= self.width,
            f"model.value_embeddings needs model.value_gate_channels={self.value_gate_channels} to lie in 1 ... model.width={self.width}.",
        )
        least = 0 if self.kind == "deq" else 1  # a DEQ may solve for everything
        _require(self.backbone_layers >= least, f"model.backbone_layers must be at least {least}, not {self.backbone_layers}.")
        _require(
            self.vocabulary_size is None or self.vocabulary_size > 1,
            f"model.vocabulary_size must be above 1 or left out, not {self.vocabulary_size}.",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def solves(self) -> bool:
        """Whether an equilibrium is found: the sections attractor, solver and gradient are read."""
        return self.kind in ("attractor", "deq")

    @property
    def loops(self) -> bool:
        """Whether blocks are applied again and again: the section loop is read."""
        return self.kind in ("parcae", "looped")

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def has_value_embedding(self, layer: int) -> bool:
        """Every other block, the last included."""
        return self.value_embeddings and layer % 2 == (self.backbone_layers - 1) % 2


@dataclass(frozen=True)
class AttractorConfig:
    """Section `attractor`: the weight-tied map f(y, y0)."""

    layers: int = 1
    """Blocks in the map."""
    injection: Injection = "additive"
    """additive: f = y0 + D(y + y0). concat: f = y0 + D(W [y; y0]). init_only: f = y + D(y), y0 only as the start.
    cross_attention: f = y0 + D(y), with keys and values of its attention read from y0."""
    gate_initial: float = 0.75
    """Per-channel gate gamma = gate_maximum * sigmoid(raw) on each sub-layer, at initialisation."""
    gate_maximum: float = 0.75
    """Upper end of the gate. gate_initial == gate_maximum starts (as published) at a nearly saturated sigmoid."""

    def __post_init__(self) -> None:
        _require(self.layers >= 1, f"attractor.layers must be at least 1, not {self.layers}.")
        _require(
            0 < self.gate_initial <= self.gate_maximum,
            f"attractor.gate_initial={self.gate_initial} must lie above 0 and not above attractor.gate_maximum={self.gate_maximum}.",
        )


@dataclass(frozen=True)
class SolverConfig:
    """Section `solver`: how the fixed point is found. An iteration is one evaluation of f."""

    start: Literal["proposal", "zero", "noise"] | None = None
    """Where the solve begins; noise as model/noise.py draws it. None: the proposal, of a deq zero."""
    method: Literal["picard", "anderson"] = "anderson"
    mixing: Literal["token", "sequence"] = "token"
    """Anderson coefficients per token (causal) or per sequence (the published code's; leaks later tokens into earlier ones)."""
    history: int = 2
    """Stored differences of Anderson mixing. The published window of 5 states is history 4."""
    damping: float = 1.0
    """Share beta of f in the mixed step: y <- beta * mix(f) + (1 - beta) * mix(y)."""
    ridge: float = 1e-8
    """Relative ridge added to the Gram matrix of residual differences."""
    tolerance: float = 3e-4
    """A sequence has converged when ||f(y) - y|| / ||y|| falls below it."""
    max_iterations: int = 64
    min_iterations: int = 1
    """Evaluations before the first convergence test."""
    patience: int = 3
    """A sequence whose residual has set no new low for so many evaluations is stopped: bf16 cannot go below its rounding, and
    an untrained map may not contract. It counts as not converged."""
    stop: Literal["norm", "max_token"] = "norm"
    """Residual that decides: of the whole sequence, or its worst token's."""
    compaction: bool = True
    """Converged sequences leave the batch and stop costing compute."""
    expected_iterations: float = 6.0
    """Evaluations a solve to plan with, before any were measured."""

    def __post_init__(self) -> None:
        _require(
            self.tolerance > 0,
            f"solver.tolerance must be above 0, not {self.tolerance}; for a fixed count set min_iterations=max_iterations.",
        )
        _require(
            1 <= self.min_iterations <= self.max_iterations,
            f"solver.min_iterations={self.min_iterations} must be at least 1 and at most solver.max_iterations={self.max_iterations}.",
        )
        _require(
            self.patience >= 1, f"solver.patience must be at least 1, not {self.patience}; max_iterations or more never stops a stall."
        )
        _require(self.history >= 1, f"solver.history must be at least 1, not {self.history}; method=picard uses none.")
        _require(0 < self.damping <= 1, f"solver.damping must lie in (0, 1], not {self.damping}.")
        _require(self.ridge >= 0, f"solver.ridge must not be negative, not {self.ridge}.")

    @property
    def fixed(self) -> bool:
        """Whether the number of evaluations is known beforehand, so that nothing need be read back from the device."""
        return self.min_iterations == self.max_iterations


@dataclass(frozen=True)
class GradientConfig:
    """Section `gradient`: what stands for u = (I - J^T)^-1 v in dL/dtheta = u^T df/dtheta."""

    mode: Literal["one_step", "neumann", "phantom", "adjoint"] = "one_step"
    """one_step: u = v. neumann: u = sum_{i<=steps} (J^T)^i v. phantom: `steps` damped differentiable steps. adjoint: solved."""
    steps: int = 1
    """k of neumann-k and phantom-k."""
    damping: float = 1.0
    """lambda of phantom: y <- lambda f(y) + (1 - lambda) y."""
    tolerance: float | None = None
    """Of the adjoint solve; None takes solver.tolerance."""
    max_iterations: int | None = None
    """Of the adjoint solve; None takes solver.max_iterations."""
    clip: float | None = None
    """neumann and adjoint: bound on ||J^T u|| / ||v|| per sequence; None leaves it unbounded."""
    convergence_penalty: float = 0.0
    """Weight of mean ||f(y*) - y*||^2 / ||y*||^2, which rewards fast convergence."""
    jacobian_penalty: float = 0.0
    """Weight of ||J^T e||^2 / n, e ~ N(0, I): Hutchinson's estimate of ||J||_F^2 / n (Bai et al. 2021)."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"gradient.steps must be at least 1, not {self.steps}.")
        _require(0 < self.damping <= 1, f"gradient.damping must lie in (0, 1], not {self.damping}.")
        for name in ("tolerance", "max_iterations", "clip"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"gradient.{name} must be above 0 or left out, not {value}.")
        for name in ("convergence_penalty", "jacobian_penalty"):
            _require(getattr(self, name) >= 0, f"gradient.{name} must be 0 (off) or above, not {getattr(self, name)}.")


@dataclass(frozen=True)
class LoopConfig:
    """Section `loop`: the blocks that `parcae` and `looped` apply again and again, and how often."""

    core: int = 2
    """Blocks in the loop."""
    coda: int = 2
    """Blocks after it; what model.backbone_layers leaves comes before it (the prelude)."""
    iterations: int = 8
    """parcae: mean of the Poisson count of a sequence in training, and the count of evaluation. looped: the count."""
    backprop: int | None = 4
    """parcae: last iterations that gradients pass through; None: all. looped always passes through all."""

    def __post_init__(self) -> None:
        _require(self.core >= 1, f"loop.core must be at least 1, not {self.core}.")
        _require(self.coda >= 0, f"loop.coda must not be negative, not {self.coda}.")
        _require(
            1 <= self.iterations <= 500,  # far beyond, exp(-mean) is 0 and Poisson's distribution cannot be summed
            f"loop.iterations must lie in 1 ... 500, not {self.iterations}.",
        )
        _require(self.backprop is None or self.backprop >= 1, f"loop.backprop must be at least 1 or left out, not {self.backprop}.")


@dataclass(frozen=True)
class ModelConfig:
    """The five sections together: all that `model.build` needs."""

    model: BackboneConfig = field(default_factory=BackboneConfig)
    attractor: AttractorConfig = field(default_factory=AttractorConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        looped = self.loop.core + self.loop.coda
        _require(
            not self.model.loops or looped <= self.model.backbone_layers,
            f"model.backbone_layers={self.model.backbone_layers} counts all blocks of a {self.model.kind}, and loop.core={self.loop.core} "
            f"with loop.coda={self.loop.coda} makes {looped}: raise the former, or lower one of the latter.",
        )

        injection = self.attractor.injection
        _require(
            self.model.kind != "attractor" or injection != "init_only" or self.start == "proposal",
            f"attractor.injection=init_only sees the proposal as the start alone, which solver.start={self.solver.start} replaces: the "
            "model would not see its input. Leave solver.start out, or choose another injection.",
        )
        _require(
            self.model.kind != "deq" or injection == "additive",
            f"attractor.injection={injection} is the attractor's: a deq (model.kind=deq) adds its input at every iteration. Leave it out.",
        )

    @property
    def prelude(self) -> int:
        """Blocks before anything is solved or looped: the whole backbone, but of parcae and looped."""
        m = self.model
        return m.backbone_layers - (self.loop.core + self.loop.coda if m.loops else 0)

    @property
    def start(self) -> str:
        """Where a solve begins: proposal, zero or noise."""
        return self.solver.start or ("zero" if self.model.kind == "deq" else "proposal")
