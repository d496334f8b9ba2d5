"""Parameters, FLOPs and bytes of a model in closed form, as functions of the solver's iterations and of how ranks divide it. No torch.

Conventions, so that the figures can be checked (tests hold them to torch's FlopCounterMode):
- A matrix product of [m, k] by [k, n] is 2 m k n. Norms, gates, rotary, softmax, mixing and embedding look-ups count nothing.
- Attention is counted as the kernels do and FlopCounterMode does, over the full square: 4 s per head channel and token
  forward (scores, values); causal kernels may skip half of it. Backward is twice that in the model's own FLOPs, and 2.5
  times in the hardware's, because fused kernels compute the scores again.
- Backward of a matrix product is two: one for its input, one for its weight. A vector-Jacobian product of the solve's map
  (implicit backward) needs only the first.
- Model FLOPs: what the method requires (evaluations of f included, since they are its depth). Hardware FLOPs: what ran,
  so with the score and block recomputation added. MFU divides the former by the peak.

Units: FLOPs a token, of all tensor ranks together, unless a name says otherwise. `evaluations` is the measured number a sequence.
"""

from __future__ import annotations

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


def _value_gate(config: BackboneConfig) -> int:
    return config.value_gate_channels * config.key_value_heads


def _value_tables(config: BackboneConfig) -> int:
    return sum(config.has_value_embedding(layer) for layer in range(config.backbone_layers))


def _constant(config: ModelConfig) -> int:
    """Parameters of the map's matrices that see y0 alone: a vector-Jacobian product with respect to y passes them by."""
    m = config.model
    keys_and_values = 2 * m.width * m.head_dim * m.key_value_heads
    return config.attractor.layers * keys_and_values if config.attractor.injection == "cross_attention" else 0


def _merge(config: ModelConfig) -> int:
    return 2 * config.model.width**2 if config.attractor.injection == "concat" else 0


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters by kind; model.vocabulary_size must be set."""
    m = config.model
    if m.vocabulary_size is None:
        raise ValueError("model.vocabulary_size must be set to count parameters.")
    table = m.vocabulary_size * m.width
    value_table = m.vocabulary_size * m.key_value_heads * m.head_dim
    tables = _value_tables(m)
    backbone_matrices = m.backbone_layers * _matrices(m) + tables * _value_gate(m)
    attractor_matrices = attractor = 0
    if m.kind == "attractor":
        attractor_matrices = config.attractor.layers * _matrices(m) + _merge(config)
        attractor = attractor_matrices + config.attractor.layers * 4 * m.width  # two norms and two gates a block
    backbone = backbone_matrices + m.backbone_layers * 2 * m.width + m.width  # the final norm too
    head = 0 if m.tied_embeddings else table
    return Parameters(
        total=table + tables * value_table + backbone + attractor + head,
        matmul=backbone_matrices + attractor_matrices,
        embedding=table,
        value_embedding=tables * value_table,
        backbone=backbone,
        attractor=attractor,
        head=head,
    )


def flops(
    config: ModelConfig,
    sequence_length: int,
    evaluations: float,
    *,
    products: float | None = None,
    training: bool = True,
    recompute: bool = False,
) -> Flops:
    """FLOPs a token. evaluations: of f a sequence in the solve, as measured (0: decode the proposal).

    products: vector-Jacobian products a sequence in backward; None takes what the mode implies (adjoint: solver.expected_iterations).
    """
    m = config.model
    attention = 4.0 * sequence_length * m.heads * m.head_dim  # a block and token, forward
    backbone = 2.0 * (m.backbone_layers * _matrices(m) + _value_tables(m) * _value_gate(m))
    backbone_attention = m.backbone_layers * attention
    head = 2.0 * (m.vocabulary_size or 0) * m.width
    solved = m.kind == "attractor"
    f_matmul = 2.0 * (config.attractor.layers * _matrices(m) + _merge(config)) if solved else 0.0
    f_attention = config.attractor.layers * attention if solved else 0.0
    f = f_matmul + f_attention
    if not training:
        return Flops(head, 0, backbone + backbone_attention, 0, evaluations * f, 0, 0, 0)
    applications = (config.gradient.steps if config.gradient.mode == "phantom" else 1) if solved else 0
    products = implied_products(config) if products is None else products
    scores = 0.5 * (backbone_attention + (applications + products) * f_attention)
    recomputable = config.gradient.mode in ("one_step", "phantom")
    skipped = m.backbone_layers * 2.0 * m.hidden * m.width  # recomputation stops before a block's last product: nothing saved it
    again = (backbone - skipped + backbone_attention + (applications * f if recomputable else 0)) if recompute else 0
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
    if config.model.kind != "attractor":
        return 0
    return {"neumann": float(config.gradient.steps), "adjoint": config.solver.expected_iterations}.get(config.gradient.mode, 0.0)


@dataclass(frozen=True)
class Share:
    """What one rank holds of a model: blocks first:stop of the backbone and which of its ends, cut over `tensor` ranks."""

    first: int
    stop: int
    start: bool
    """The token embedding."""
    end: bool
    """Attractor, final norm and unembedding: a second copy of a tied table, where `start` is elsewhere."""
    tensor: int = 1
    sequence_parallel: bool = False
    in_flight: int = 1
    """Micro-batches whose activations are kept at once."""


def whole(config: ModelConfig) -> Share:
    """One rank that holds everything."""
    return Share(0, config.model.backbone_layers, start=True, end=True)


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
    """Parameters of one rank, exactly. Tensor ranks divide every matrix but the merge of a concat injection, and repeat vectors."""
    m, blocks = config.model, range(share.first, share.stop)
    tables = sum(m.has_value_embedding(layer) for layer in blocks)
    matrices = len(blocks) * _matrices(m)
    divided = matrices + tables * (_value_gate(m) + (m.vocabulary_size or 0) * m.key_value_heads * m.head_dim)
    replicated = len(blocks) * 2 * m.width
    divided += (m.vocabulary_size or 0) * m.width * (share.start + (share.end and not (share.start and m.tied_embeddings)))
    if share.end:
        replicated += m.width
    if share.end and m.kind == "attractor":
        divided += config.attractor.layers * _matrices(m)
        replicated += config.attractor.layers * 4 * m.width + _merge(config)
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
    solving = share.end and config.model.kind == "attractor"
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
    block lives at a time. Iterations of the solver keep nothing.

    Tensor ranks divide what lies between matrices of a block. Where tokens are divided (sequence_parallel; always in the
    attractor) they also divide norm inputs and what gates multiply, but not norm outputs, which matrices read whole. A stage that
    is not the last keeps what it sends on.
    """
    m, share = config.model, share or whole(config)
    stream = m.width / share.tensor if share.sequence_parallel else float(m.width)
    block, solved, end = block_values(m, share.tensor, share.sequence_parallel), 0.0, 0.0
    if share.end:
        end = (m.width / share.tensor if m.kind == "attractor" else stream) + 2 * m.width  # the final norm's two ends, the head's gradient
        applications = config.gradient.steps if config.gradient.mode == "phantom" and not recompute else 1
        solved = applications * config.attractor.layers * block_values(m, share.tensor, True, gated=True) if m.kind == "attractor" else 0.0
    layers = share.stop - share.first
    kept = share.in_flight * (layers * (stream if recompute else block) + (0.0 if share.end else stream))
    living = max(block if layers else 0.0, solved) if recompute else solved
    return bytes_per_value * (kept + living + end)


def block_values(m: BackboneConfig, tensor: int = 1, divided: bool = False, gated: bool = False) -> float:
    """Values a token that a rank keeps of one block; `divided` are its tokens between matrices."""
    kv = m.key_value_heads / m.heads
    inside = m.width * ((1 + kv) * (2 if m.qk_norm else 1) + kv + 2) + (4 if m.mlp == "swiglu" else 2) * m.hidden
    return 2 * m.width + (4 if gated else 2) * m.width / (tensor if divided else 1) + inside / tensor
