"""Parameters and FLOPs of a reasoning model in closed form. No torch.

The conventions are those of model/cost.py (2 m k n a matrix product, attention over the full square, fused kernels compute its scores
again in backward), and so are the records; a token is a cell, so what the prefix costs is spread over the cells. The unit of work is an
application of the network (of hrm: of one of its two) to a whole sequence:

    solve              applications without gradient: cycles before the last, the solver, the target pass of q_learning
    application        those with gradient, forward; their backward is twice that
    backbone           a transformer's one pass

The Jacobian penalty differentiates a product J^T e: its first product costs a matrix once and attention twice, its backward a matrix
twice and attention four times; and its attention, unfused, computes no scores again.
Tests hold the figures to torch's FlopCounterMode.
"""

from __future__ import annotations

from model.cost import Flops, Parameters, Work
from model.reasoning.config import ReasonerConfig, ReasoningConfig


def block_matrices(config: ReasonerConfig) -> int:
    """Parameters of the matrices of one block."""
    mixing = 4 * config.width**2 if config.mixing == "attention" else 3 * config.length * config.mixing_hidden
    return mixing + 3 * config.width * config.hidden


def count_reasoner(config: ReasoningConfig) -> Parameters:
    """Parameters by kind; embedding holds the tokens', the puzzles' and the learned positions'. Raises ValueError while
    model.vocabulary_size or model.cells is open."""
    m = config.model
    if m.vocabulary_size is None:
        raise ValueError("model.vocabulary_size must be set to count parameters.")
    puzzles = m.identifiers if m.prefix else 0
    positions = m.length if m.positions == "learned" else 0
    embedding = (m.vocabulary_size + puzzles + positions) * m.width
    blocks = m.networks * m.layers * block_matrices(m)
    head = m.vocabulary_size * m.width + 2 * m.width + 2
    return Parameters(
        total=embedding + blocks + head,
        matmul=blocks,
        embedding=embedding,
        value_embedding=0,
        backbone=0 if m.solves else blocks,
        attractor=blocks if m.solves else 0,
        head=head,
    )


def planned_work(config: ReasoningConfig) -> Work:
    """Applications of the network a sequence in a training step, with solver.expected_iterations evaluations a solve."""
    m, last = config.model, config.applications
    updates = m.inner_cycles + 1
    expected = config.solver.expected_iterations
    if m.kind == "transformer":
        work = Work(0.0, 1.0, 0.0)
    elif m.kind == "trm":
        work = Work((m.outer_cycles - 1.0) * updates, float(updates), 0.0)
    elif m.kind == "hrm":
        work = Work(m.outer_cycles * updates - 2.0, 2.0, 0.0)
    elif m.solve == "z":
        work = Work(m.outer_cycles * expected + (m.outer_cycles - 1.0) * (last + 1), last + 1.0, 0.0)
    else:
        work = Work(expected * updates, float(last * updates), 0.0)
    if config.supervision.halting == "q_learning":  # the target pass
        again = m.outer_cycles * (expected + last + 1) if m.kind == "attractor" and m.solve == "z" else work.evaluations + work.applications
        work = Work(work.evaluations + again, work.applications, 0.0)
    return work


def network_flops(config: ReasonerConfig) -> tuple[float, float]:
    """(matrices, attention): FLOPs of one forward application of the network to a whole sequence."""
    length, width = config.length, config.width
    if config.mixing == "attention":
        matrices = 2.0 * length * block_matrices(config)
        return config.layers * matrices, config.layers * 4.0 * length**2 * width
    mixing = 2.0 * width * 3 * length * config.mixing_hidden
    return config.layers * (mixing + 2.0 * length * 3 * width * config.hidden), 0.0


def reasoner_flops(config: ReasoningConfig, work: Work) -> Flops:
    """FLOPs a cell of a training step that does so much work a sequence, as measured or as `planned_work` expects."""
    m = config.model
    cells, vocabulary = float(m.length - m.prefix), m.vocabulary_size or 0
    matrices, attention = (part / cells for part in network_flops(m))
    head = (2.0 * m.length * m.width * vocabulary + 2.0 * m.width * 2) / cells
    q_learning = 2 * head if config.supervision.halting == "q_learning" else head
    penalised = 0.0  # applications of the network that the Jacobian penalty goes through
    if m.solves and config.gradient.jacobian_penalty:
        penalised = 1.0 if m.solve == "z" else m.inner_cycles + 1.0
    applied = work.applications * (matrices + attention)
    direct = m.kind == "transformer"
    return Flops(
        head_forward=q_learning,
        head_backward=2 * head,
        backbone_forward=applied if direct else 0.0,
        backbone_backward=2 * applied if direct else 0.0,
        solve=work.evaluations * (matrices + attention),
        application=0.0 if direct else applied,
        implicit_backward=(0.0 if direct else 2 * applied) + penalised * (3 * matrices + 6 * attention),
        recomputation=0.5 * (work.applications - penalised) * attention,
    )
