"""Parameters and FLOPs of a model in closed form, as functions of the iterations of its solver or loop. No torch.

Conventions, so that the figures can be checked (tests hold them to torch's FlopCounterMode):
- A matrix product of [m, k] by [k, n] is 2 m k n. Norms, gates, rotary, softmax, mixing and embedding look-ups count nothing.
- Attention is counted as the kernels do and FlopCounterMode does, over the full square: 4 s per head channel and token
  forward (scores, values); causal kernels may skip half of it. Backward is twice that in the model's own FLOPs, and 2.5
  times in the hardware's, because fused kernels compute the scores again.
- Backward of a matrix product is two: one for its input, one for its weight. A vector-Jacobian product of the solve's map
  (implicit backward) needs only the first.
- f is the map of a solve (attractor, deq), or the looped blocks (parcae, looped): evaluated so many times a sequence without gradients,
  and applied so many times with them. What a loop computes once (B e, C h, its coda) counts as backbone.
- Model FLOPs: what the method requires (evaluations of f included, since they are its depth). Hardware FLOPs: what ran,
  so with the score and block recomputation added. MFU divides the former by the peak.

Units: FLOPs a token, of all tensor ranks together, unless a name says otherwise. `evaluations` is the measured number a sequence.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from model.config import BackboneConfig, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `matmul` are those inside blocks that multiply every token; a tied unembedding is not in it."""

    total: int
    matmul: int
    embedding: int
    value_embedding: int
    backbone: int
    attractor: int
    head: int


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of one training step (or, with training=False, of one forward pass), by part."""

    head_forward: float
    head_backward: float
    backbone_forward: float
    backbone_backward: float
    solve: float
    """Evaluations of f without gradient."""
    application: float
    """The differentiable application(s) of f at y*."""
    implicit_backward: float
    """Backward of the application, and the vector-Jacobian products of neumann and adjoint."""
    recomputation: float
    """Hardware only: blocks run again in backward, and attention scores computed again by fused backward kernels."""

    @property
    def model(self) -> float:
        return self.hardware - self.recomputation

    @property
    def hardware(self) -> float:
        return sum(asdict(self).values())


def block_matrices(config: BackboneConfig) -> int:
    """Parameters of the matrices of one block."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.key_value_heads)
    return attention + (3 if config.mlp == "swiglu" else 2) * config.width * config.hidden


def _gates(config: BackboneConfig, blocks: range) -> int:
    """Value gates of some blocks, in parameters."""
    return sum(config.has_value_embedding(layer) for layer in blocks) * config.value_gate_channels * config.key_value_heads


def loop_matrices(config: ModelConfig) -> int:
    """Parameters of a loop's matrices B and C."""
    return 2 * config.model.width**2 if config.model.kind == "parcae" else 0


def _core(config: ModelConfig) -> range:
    """The looped blocks, by their number in the model; none where nothing loops."""
    return range(config.prelude, config.prelude + config.loop.core) if config.model.loops else range(0)


def _constant(config: ModelConfig) -> int:
    """Parameters of the map's matrices that see y0 alone: a vector-Jacobian product with respect to y passes them by."""
    m = config.model
    keys_and_values = 2 * m.width * m.head_dim * m.key_value_heads
    return config.attractor.layers * keys_and_values if _injection(config) == "cross_attention" else 0


def _injection(config: ModelConfig) -> str:
    return config.attractor.injection if config.model.kind == "attractor" else "additive"


def merge_matrix(config: ModelConfig) -> int:
    return 2 * config.model.width**2 if _injection(config) == "concat" else 0


def solved_vectors(config: ModelConfig) -> int:
    """Parameters of the vectors of a solved map: two norms and two gates a block, and a deq's norms of input and state."""
    return (config.attractor.layers * 4 + (2 if config.model.kind == "deq" else 0)) * config.model.width


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters by kind; model.vocabulary_size must be set. Those of a loop count as backbone, those of a deq's map as attractor."""
    m = config.model
    if m.vocabulary_size is None:
        raise ValueError("model.vocabulary_size must be set to count parameters.")
    table = m.vocabulary_size * m.width
    blocks = range(m.backbone_layers)
    value_tables = sum(map(m.has_value_embedding, blocks)) * m.vocabulary_size * m.key_value_heads * m.head_dim
    backbone_matrices = len(blocks) * block_matrices(m) + _gates(m, blocks) + loop_matrices(config)
    attractor_matrices = attractor = 0
    if m.solves:
        attractor_matrices = config.attractor.layers * block_matrices(m) + merge_matrix(config)
        attractor = attractor_matrices + solved_vectors(config)
    vectors = (2 * len(blocks) + 1 + (3 if m.kind == "parcae" else 0)) * m.width  # the final norm; a prelude norm, A and dt
    head = 0 if m.tied_embeddings else table
    return Parameters(
        total=table + value_tables + backbone_matrices + vectors + attractor + head,
        matmul=backbone_matrices + attractor_matrices,
        embedding=table,
        value_embedding=value_tables,
        backbone=backbone_matrices + vectors,
        attractor=attractor,
        head=head,
    )


@dataclass(frozen=True)
class Work:
    """How often f runs, a sequence."""

    evaluations: float
    """Without gradients."""
    applications: float
    """With gradients."""
    products: float
    """Vector-Jacobian products in backward, beyond that of the applications."""


def planned(config: ModelConfig, iterations: float | None = None) -> Work:
    """What a training step is expected to do, or does with that many iterations of the solver or of the loop.

    A Parcae's iterations are the mean of the Poisson numbers n it draws; of max(1, n) iterations, min(n, backprop) have gradients.
    """
    m, loop = config.model, config.loop
    if m.loops:
        mean = float(loop.iterations if iterations is None else iterations)
        if m.kind == "looped":
            return Work(0.0, mean, 0.0)
        count = _poisson_mean(mean)
        kept = count if loop.backprop is None else _poisson_mean(mean, loop.backprop)
        return Work(count - kept, kept, 0.0)
    if not m.solves:
        return Work(0.0, 0.0, 0.0)
    evaluations = config.solver.expected_iterations if iterations is None else iterations
    applications = config.gradient.steps if config.gradient.mode == "phantom" else 1
    return Work(float(evaluations), float(applications), implied_products(config))


def _poisson_mean(mean: float, most: int = 10**6) -> float:
    """E[min(most, max(1, n))] for n ~ Poisson(mean): the sum of the chances of at least 1, 2, ... most."""
    chance, below = math.exp(-mean), math.exp(-mean)  # of n = k; of n <= k
    total = 1.0
    for k in range(1, min(most, int(mean + 20 * math.sqrt(mean) + 20)) + 1):
        total += max(0.0, 1 - below) if k > 1 else 0.0
        chance *= mean / k
        below += chance
    return total


def flops(
    config: ModelConfig,
    sequence_length: int,
    evaluations: float,
    *,
    products: float | None = None,
    applications: float | None = None,
    training: bool = True,
    recompute: bool = False,
) -> Flops:
    """FLOPs a token. evaluations: of f a sequence without gradients, as measured (0: decode the proposal, where something is solved).

    products: vector-Jacobian products a sequence in backward; None takes what the mode implies (adjoint: solver.expected_iterations).
    applications: of f with gradients, a sequence; None takes what `planned` expects.
    """
    m = config.model
    attention = 4.0 * sequence_length * m.heads * m.head_dim  # a block and token, forward
    core = _core(config)
    once = [layer for layer in range(m.backbone_layers) if layer not in core]  # blocks that run once
    gates = _gates(m, range(m.backbone_layers)) - _gates(m, core)
    backbone = 2.0 * (len(once) * block_matrices(m) + gates + loop_matrices(config))
    backbone_attention = len(once) * attention
    head = 2.0 * (m.vocabulary_size or 0) * m.width
    inside = config.attractor.layers if m.solves else len(core)  # blocks of f
    f_matmul = 2.0 * (inside * block_matrices(m) + _gates(m, core) + (merge_matrix(config) if m.solves else 0))
    f_attention = inside * attention
    f = f_matmul + f_attention
    if not training:
        return Flops(head, 0, backbone + backbone_attention, 0, evaluations * f, 0, 0, 0)
    expected = planned(config)
    applications = expected.applications if applications is None else applications
    products = expected.products if products is None else products
    scores = 0.5 * (backbone_attention + (applications + products) * f_attention)
    recomputable = m.loops or config.gradient.mode in ("one_step", "phantom")
    last = 2.0 * m.hidden * m.width  # recomputation stops before a block's last product: nothing saved it
    skipped = len(once) * last
    f_again = f - (inside * last if m.loops else 0)  # an attractor is recomputed as a whole, a loop block by block
    kept = 2.0 * loop_matrices(config)  # B and C are not recomputed
    again = (backbone - kept - skipped + backbone_attention + (applications * f_again if recomputable else 0)) if recompute else 0
    return Flops(
        head_forward=head,
        head_backward=2 * head,
        backbone_forward=backbone + backbone_attention,
        backbone_backward=2 * (backbone + backbone_attention),
        solve=evaluations * f,
        application=applications * f,
        implicit_backward=applications * 2 * f + products * (f_matmul - 2 * _constant(config) + 2 * f_attention),
        recomputation=scores + again,
    )


def training_flops(config: ModelConfig, sequence_length: int, work: Work, *, recompute: bool = False) -> Flops:
    """FLOPs a token of a training step that does so much work a sequence, as measured or planned."""
    return flops(
        config,
        sequence_length,
        work.evaluations,
        products=work.products,
        applications=work.applications,
        recompute=recompute,
    )


def implied_products(config: ModelConfig) -> float:
    """Vector-Jacobian products a sequence to plan with."""
    if not config.model.solves:
        return 0
    return {"neumann": float(config.gradient.steps), "adjoint": config.solver.expected_iterations}.get(config.gradient.mode, 0.0)
