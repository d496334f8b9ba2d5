"""What a rank holds of a model, and the bytes that takes, in closed form: parameters, activations, the solver's states. No torch.

    bytes = weights + gradients + optimizer + activations + solver, divided as the ZeRO stage, tensor ranks and stages divide them

Parameters are exact, activations an estimate that tests hold to what autograd keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.config import BackboneConfig, ModelConfig
from model.cost import block_matrices, loop_matrices, merge_matrix, planned, solved_vectors


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
    matrices = len(held) * block_matrices(m)
    divided = matrices + tables * (m.value_gate_channels * m.key_value_heads + rows * m.key_value_heads * m.head_dim)
    divided += rows * m.width * (share.start + (share.end and not (share.start and m.tied_embeddings)))
    replicated = len(held) * 2 * m.width
    if share.end:
        replicated += m.width + (loop_matrices(config) + 3 * m.width if m.kind == "parcae" else 0)
    if share.end and m.solves:
        divided += config.attractor.layers * block_matrices(m)
        replicated += solved_vectors(config) + merge_matrix(config)
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
