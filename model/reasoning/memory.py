"""Bytes of a reasoning model on one rank, in closed form: what it holds, and what of a supervision step is kept for backward. No torch.

    bytes = weights + gradients + optimizer + latents + activations + solver

Latents are carried from step to step, of every puzzle under way. Activations are those of the last cycle alone: the applications of the
network with gradient, which `planned_work` counts; cycles before it, and what a solver tries, keep nothing. Parameters and latents are
exact, activations an estimate that tests hold to what autograd keeps (eager; a compiled network keeps less).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.reasoning.config import ReasonerConfig, ReasoningConfig
from model.reasoning.cost import count_reasoner, planned_work


@dataclass(frozen=True)
class ReasonerMemory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    latents: float
    activations: float
    solver: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def reasoner_memory(
    config: ReasoningConfig, rows: int, micro_batch: int, *, bytes_per_value: int, zero: int, data_ranks: int, average: bool
) -> ReasonerMemory:
    """Bytes on one of data_ranks ranks under ZeRO stage 0 or 1. rows: puzzles under way on it; micro_batch: those of one forward pass.

    Gradients are fp32. The optimizer holds fp32 masters (of fp32 weights DeepSpeed makes a copy under ZeRO 1 alone), two moments, an
    `average` if kept; ZeRO 1 divides it. Raises ValueError while model.vocabulary_size or model.cells is open.
    """
    m, parameters = config.model, count_reasoner(config).total
    master = 4 if bytes_per_value == 2 or zero else 0
    cells, states = m.length - m.prefix, 0 if m.kind == "transformer" else 2
    solved = 2 if m.solve == "yz" else 1
    return ReasonerMemory(
        weights=float(parameters * bytes_per_value),
        gradients=parameters * 4.0,
        optimizer=parameters * (master + 8.0 + 4 * average) / (data_ranks if zero else 1),
        latents=float(rows * (states * m.length * m.width * bytes_per_value + 2 * cells)),
        activations=micro_batch * activation_bytes(config, bytes_per_value),
        solver=4.0 * _solver_copies(config) * micro_batch * solved * m.length * m.width if m.solves else 0.0,
    )


def activation_bytes(config: ReasoningConfig, bytes_per_value: int) -> float:
    """Bytes a puzzle that autograd keeps of one supervision step: every block of every application with gradient, the embedded puzzle
    and the answer that the heads read."""
    m = config.model
    blocks = planned_work(config).applications * m.layers * block_values(m)
    return bytes_per_value * m.length * (blocks + 2 * m.width)


def block_values(config: ReasonerConfig) -> float:
    """Values a position kept of one block: both ends of its two norms (4), the MLP's hidden width four times, and of what mixes positions
    either q, k, v, the attended values as computed and as reshaped, and q and k as turned, or a mixing MLP's hidden size four times."""
    width = config.width
    if config.mixing == "mlp":
        mixing = 4.0 * width * config.mixing_hidden / config.length
    else:
        mixing = (6.0 if config.positions == "rope" else 4.0) * width
    return 4 * width + 4 * config.hidden + mixing


def _solver_copies(config: ReasoningConfig) -> int:
    """fp32 tensors as large as the state: the state, f, r, the f and r before, and a pair of differences for every step of history."""
    return 5 + (2 * config.solver.history if config.solver.method == "anderson" else 0)
