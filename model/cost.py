"""Parameters, FLOPs and bytes of a model in closed form, as functions of the solver's iterations. No torch.

Conventions, so that the figures can be checked (tests hold them to torch's FlopCounterMode):
- A matrix product of [m, k] by [k, n] is 2 m k n. Norms, gates, rotary, softmax, mixing and embedding look-ups count nothing.
- Attention is counted as the kernels do and FlopCounterMode does, over the full square: 4 s per head channel and token
  forward (scores, values); causal kernels may skip half of it. Backward is twice that in the model's own FLOPs, and 2.5
  times in the hardware's, because fused kernels compute the scores again.
- Backward of a matrix product is two: one for its input, one for its weight. A vector-Jacobian product of the solve's map
  (implicit backward) needs only the first.
- Model FLOPs: what the method requires (evaluations of f included, since they are its depth). Hardware FLOPs: what ran,
  so with the score and block recomputation added. MFU divides the former by the peak.

Units: FLOPs a token unless a name says otherwise. `evaluations` is the measured number a sequence.
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
    products = _implied_products(config) if products is None else products
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


def _implied_products(config: ModelConfig) -> float:
    if config.model.kind != "attractor":
        return 0
    return {"neumann": float(config.gradient.steps), "adjoint": config.solver.expected_iterations}.get(config.gradient.mode, 0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations are an estimate (see activation_bytes); the rest is exact up to padding."""

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
) -> Memory:
    """Bytes on one of data_ranks ranks under ZeRO stage `zero`, AdamW moments counted for every parameter.

    fp32: weights 4, gradients 4, two moments 8. bf16: weights 2, fp32 accumulated gradients 4, fp32 master and moments 12.
    ZeRO 1 divides the optimizer, 2 the gradients too, 3 the weights too.
    """
    total = count_parameters(config).total
    state = 8 if bytes_per_value == 4 else 12
    share = [1 if zero < stage else data_ranks for stage in (1, 2, 3)]
    tokens = micro_batch * sequence_length
    # y, f, r, the previous f and r, and a pair of differences for every step of history, all fp32
    copies = (5 + (2 * config.solver.history if config.solver.method == "anderson" else 0)) if config.model.kind == "attractor" else 0
    return Memory(
        weights=total * bytes_per_value / share[2],
        gradients=total * 4 / share[1],
        optimizer=total * state / share[0],
        activations=tokens * activation_bytes(config, bytes_per_value, recompute=recompute),
        solver=4.0 * copies * tokens * config.model.width,
    )


def activation_bytes(config: ModelConfig, bytes_per_value: int, *, recompute: bool = False) -> float:
    """Bytes a token at the height of a step: an estimate from what each operation saves for backward, checked to 15 % in tests.

    A block keeps, in units of the width: inputs and outputs of two norms (4), q and k before and after their norms, v, the
    attention's output as attended and as reshaped (2); the MLP keeps its hidden width twice (relu2: after relu, squared) or
    four times (swiglu). A gated block adds what its gates multiply (2). Under recomputation blocks keep their inputs, and one
    block lives at a time. Iterations of the solver keep nothing.
    """
    m = config.model
    kv = m.key_value_heads / m.heads
    block = m.width * (4 + (1 + kv) * (2 if m.qk_norm else 1) + kv + 2) + (4 if m.mlp == "swiglu" else 2) * m.hidden
    applications = config.gradient.steps if config.gradient.mode == "phantom" and not recompute else 1
    solved = applications * config.attractor.layers * (block + 2 * m.width) if m.kind == "attractor" else 0
    kept = m.backbone_layers * m.width + max(block, solved) if recompute else m.backbone_layers * block + solved
    return bytes_per_value * (kept + 3 * m.width)  # the final norm's input and output, and the head's gradient
