"""Parameters, FLOPs and bytes of a model in closed form, as functions of the solver's iterations and of how ranks divide it. No torch.

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


def _matrices(config: BackboneConfig) -> int:
    """Parameters of the matrices of one block."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.key_value_heads)
    return attention + (3 if config.mlp == "swiglu" else 2) * config.width * config.hidden


def _gates(config: BackboneConfig, blocks: range) -> int:
    """Value gates of some blocks, in parameters."""
    return sum(config.has_value_embedding(layer) for layer in blocks) * config.value_gate_channels * config.key_value_heads


def _ends(config: ModelConfig) -> int:
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


def _merge(config: ModelConfig) -> int:
    return 2 * config.model.width**2 if _injection(config) == "concat" else 0


def _solved_vectors(config: ModelConfig) -> int:
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
    backbone_matrices = len(blocks) * _matrices(m) + _gates(m, blocks) + _ends(config)
    attractor_matrices = attractor = 0
    if m.solves:
        attractor_matrices = config.attractor.layers * _matrices(m) + _merge(config)
        attractor = attractor_matrices + _solved_vectors(config)
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

    Of a Poisson loop the expectation is exact: of n = max(1, Poisson) iterations, min(n, backprop) have gradients.
    """
    m, loop = config.model, config.loop
    if m.loops:
        if m.kind == "looped" or loop.backprop is None or iterations is not None:
            count = float(loop.iterations if iterations is None else iterations)
            if m.kind == "parcae" and iterations is None:
                count = _poisson_mean(loop.iterations, 10**6)
            kept = count if m.kind == "looped" or loop.backprop is None else min(count, loop.backprop)
            return Work(count - kept, kept, 0.0)
        kept = _poisson_mean(loop.iterations, loop.backprop)
        return Work(_poisson_mean(loop.iterations, 10**6) - kept, kept, 0.0)
    if not m.solves:
        return Work(0.0, 0.0, 0.0)
    evaluations = config.solver.expected_iterations if iterations is None else iterations
    applications = config.gradient.steps if config.gradient.mode == "phantom" else 1
    return Work(float(evaluations), float(applications), implied_products(config))


def _poisson_mean(mean: float, most: int) -> float:
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
    backbone = 2.0 * (len(once) * _matrices(m) + gates + _ends(config))
    backbone_attention = len(once) * attention
    head = 2.0 * (m.vocabulary_size or 0) * m.width
    inside = config.attractor.layers if m.solves else len(core)  # blocks of f
    f_matmul = 2.0 * (inside * _matrices(m) + _gates(m, core) + (_merge(config) if m.solves else 0))
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
    ends = 2.0 * _ends(config)  # B and C are kept
    again = (backbone - ends - skipped + backbone_attention + (applications * f_again if recomputable else 0)) if recompute else 0
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


def implied_products(config: ModelConfig) -> float:
    """Vector-Jacobian products a sequence to plan with."""
    if not config.model.solves:
        return 0
    return {"neumann": float(config.gradient.steps), "adjoint": config.solver.expected_iterations}.get(config.gradient.mode, 0.0)


@dataclass(frozen=True)
class Share:
    """What a rank holds of a model: blocks first:stop of the backbone (a loop's prelude) and which of its ends, cut over `tensor` ranks."""

    first: int
    stop: int
    start: bool
    """The token embedding."""
    end: bool
    """Attractor or loop and coda, final norm and unembedding: a second copy of a tied table, where `start` is elsewhere."""
    tensor: int = 1
    sequence_parallel: bool = False
    in_flight: int = 1
    """Micro-batches whose activations are kept at once."""


def whole(config: ModelConfig) -> Share:
    """One rank that holds everything."""
    return Share(0, config.prelude, start=True, end=True)


@dataclass(frozen=True)
class Held:
    """Parameters on one rank: its part of those that tensor ranks divide, and those that every tensor rank has."""

    divided: int
    replicated: int
    backbone_matrices: int
    """Of the divided ones, those that Muon updates."""

    @property
    def total(self) -> int:
        return self.divided + self.replicated


def held_parameters(config: ModelConfig, share: Share) -> Held:
    """Parameters of one rank, exactly. Tensor ranks divide every matrix but the merge of a concat injection and a loop's B and C, and
    repeat vectors."""
    m, held = config.model, list(range(share.first, share.stop))
    if share.end and m.loops:
        held += range(config.prelude, m.backbone_layers)
    rows, tables = m.vocabulary_size or 0, sum(map(m.has_value_embedding, held))
    matrices = len(held) * _matrices(m)
    divided = matrices + tables * (m.value_gate_channels * m.key_value_heads + rows * m.key_value_heads * m.head_dim)
    divided += rows * m.width * (share.start + (share.end and not (share.start and m.tied_embeddings)))
    replicated = len(held) * 2 * m.width
    if share.end:
        replicated += m.width + (_ends(config) + 3 * m.width if m.kind == "parcae" else 0)
    if share.end and m.solves:
        divided += config.attractor.layers * _matrices(m)
        replicated += _solved_vectors(config) + _merge(config)
    return Held(divided // share.tensor, replicated, matrices // share.tensor)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations and solver are estimates (see activation_bytes); the rest is exact up to padding."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    solver: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory(
    config: ModelConfig,
    sequence_length: int,
    micro_batch: int,
    *,
    bytes_per_value: int,
    zero: int,
    data_ranks: int,
    recompute: bool = False,
    share: Share | None = None,
    muon: bool = False,
    average: bool = False,
) -> Memory:
    """Bytes on one of data_ranks ranks that hold `share` (None: the whole model) under ZeRO stage `zero`.

    Gradients are fp32. The optimizer holds fp32 master weights (of fp32 weights DeepSpeed makes a copy under ZeRO 1 and 2 alone), two
    moments, of backbone matrices with `muon` one, an `average` if kept. ZeRO 1 divides it, 2 the gradients too, 3 the weights too.
    """
    share = share or whole(config)
    held = held_parameters(config, share)
    master = 4 if bytes_per_value == 2 or zero in (1, 2) else 0
    ranks = [1 if zero < stage else data_ranks for stage in (1, 2, 3)]
    tokens = micro_batch * sequence_length
    solving = share.end and config.model.solves
    return Memory(
        weights=held.total * bytes_per_value / ranks[2],
        gradients=held.total * 4 / ranks[1],
        optimizer=(held.total * (master + 8 + 4 * average) - 4 * muon * held.backbone_matrices) / ranks[0],
        activations=tokens * activation_bytes(config, bytes_per_value, recompute=recompute, share=share),
        solver=4.0 * _solver_copies(config) * tokens * config.model.width / share.tensor if solving else 0.0,
    )


def _solver_copies(config: ModelConfig) -> int:
    """fp32 tensors as large as the state: y, f, r, the previous f and r, and a pair of differences for every step of history. An
    adjoint solve has a longer history (model.implicit), and runs when the other is done."""
    if config.solver.method != "anderson":
        return 5
    history = config.solver.history
    return 5 + 2 * (max(4, history) if config.gradient.mode == "adjoint" else history)


def activation_bytes(config: ModelConfig, bytes_per_value: int, *, recompute: bool = False, share: Share | None = None) -> float:
    """Bytes a token of a micro-batch at the height of a step: an estimate of what is saved for backward, within 15 % in tests.

    A block keeps, in units of the width: inputs and outputs of two norms (4), q and k before and after their norms, v, the
    attention's output as attended and as reshaped (2); the MLP keeps its hidden width twice (relu2: after relu, squared) or
    four times (swiglu). A gated block adds what its gates multiply (2). Under recomputation blocks keep their inputs, and one
    block lives at a time. Iterations of the solver keep nothing, those of a loop with gradients everything.

    Tensor ranks divide what lies between matrices of a block. Where tokens are divided (sequence_parallel; always in the
    attractor) they also divide norm inputs and what gates multiply, but not norm outputs, which matrices read whole. A stage that
    is not the last keeps what it sends on.
    """
    m, share = config.model, share or whole(config)
    stream = m.width / share.tensor if share.sequence_parallel else float(m.width)
    block, solved, end = block_values(m, share.tensor, share.sequence_parallel), 0.0, 0.0
    if share.end:
        end = (m.width / share.tensor if m.solves else stream) + 2 * m.width  # the final norm's two ends, the head's gradient
    applications: float
    if share.end and m.solves:
        applications = config.gradient.steps if config.gradient.mode == "phantom" and not recompute else 1
        solved = applications * config.attractor.layers * block_values(m, share.tensor, True, gated=True)
    layers = share.stop - share.first
    kept = share.in_flight * (layers * (stream if recompute else block) + (0.0 if share.end else stream))
    if share.end and m.loops:
        applications = planned(config).applications
        solved = (applications * config.loop.core + config.loop.coda) * (stream if recompute else block) + applications * stream
        kept, solved = (kept + solved, block) if recompute else (kept, solved)
    living = max(block if layers else 0.0, solved) if recompute else solved
    return bytes_per_value * (kept + living + end)


def block_values(m: BackboneConfig, tensor: int = 1, divided: bool = False, gated: bool = False) -> float:
    """Values a token that a rank keeps of one block; `divided` are its tokens between matrices."""
    kv = m.key_value_heads / m.heads
    inside = m.width * ((1 + kv) * (2 if m.qk_norm else 1) + kv + 2) + (4 if m.mlp == "swiglu" else 2) * m.hidden
    return 2 * m.width + (4 if gated else 2) * m.width / (tensor if divided else 1) + inside / tensor
