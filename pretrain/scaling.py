"""A model of step time on nodes of eight H100 or H200 GPUs: seconds by part, bytes a rank sends. No torch.

    micro-batch of a stage   t_p = max(device, host) + tensor collectives + what is sent to neighbouring stages
    device                   FLOPs / T / (peak share) + bytes of elementwise operations / (HBM share)
    host                     kernels launched * launch time
    pipeline (1F1B)          (M - 1) max t_p + sum t_p          M micro-batches of P stages
    step                     pipeline + gradient reduction + optimizer
    collective of N bytes    (n - 1) / n * N / link for an all-gather or reduce-scatter over n ranks, twice that for an all-reduce

The pipeline's time is exact where the stages are equal or the last is the slowest, and an upper bound otherwise (tests/pretrain/
test_scaling.py simulates the schedule). Equal stages give the familiar bubble (P - 1) / (M + P - 1). FLOPs and parameters are those of
model/cost.py, traffic that of pretrain/tensor_parallel.py and of DeepSpeed as configured; docs/scaling.md derives every term.
It is a model: nothing in it was fitted to a measurement, and it cannot tell layouts apart that lie a few percent from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from model.cost import flops, implied_products, planned
from model.memory import Share, block_values, held_parameters
from pretrain import gpus
from pretrain.config import Recipe
from pretrain.gpus import Gpu
from pretrain.layout import Axis, Layout
from pretrain.ledger import peak_flops
from pretrain.partition import Stage
from pretrain.shares import shares


@dataclass(frozen=True)
class Estimate:
    """A step, as modelled. Seconds are those of the slowest stage, and their sum is the step; bytes are what its rank sends a step."""

    gpu: str
    seconds: dict[str, float]
    sent: dict[str, float]
    step: float
    step_overlapped: float
    """With gradient reduction hidden behind backward as far as it can be; DeepSpeed hides it under ZeRO 3 alone by default."""
    stage_seconds: list[float]
    """Of one micro-batch."""
    block_bytes: float
    """That a tensor rank sends for one backbone block of one micro-batch, forward and backward."""
    iteration_bytes: float
    """That a tensor rank sends for one solver iteration of one micro-batch."""
    tokens_per_second: float
    """A GPU."""
    mfu: float


@dataclass(frozen=True)
class _Case:
    """A complete recipe on a layout and a GPU."""

    recipe: Recipe
    layout: Layout
    gpu: Gpu

    @property
    def length(self) -> int:
        assert self.recipe.data.sequence_length is not None
        return self.recipe.data.sequence_length

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.recipe.train.micro_batch * self.length

    @property
    def value_bytes(self) -> int:
        return 2 if self.recipe.train.precision == "bf16" else 4

    @property
    def micro_batches(self) -> int:
        return self.recipe.check_world(self.layout.data)

    @property
    def matrix_rate(self) -> float:
        return (peak_flops(self.gpu.name, self.recipe.train.precision) or 0.0) * self.gpu.matrix_share

    @property
    def iterations(self) -> float:
        return self.recipe.solver.expected_iterations

    @property
    def applications(self) -> int:
        return self.recipe.gradient.steps if self.recipe.gradient.mode == "phantom" else 1

    @property
    def forwards(self) -> float:
        """Evaluations of f a sequence, with and without gradient, and again for backward where that recomputes them."""
        again = self.recipe.train.recompute and self.recipe.gradient.mode in ("one_step", "phantom")
        return self.iterations + self.applications * (2 if again else 1)

    @property
    def backwards(self) -> float:
        return self.applications + implied_products(self.recipe.architecture)

    @property
    def mixes(self) -> list[tuple[float, int, bool]]:
        """(iterations, history, over whole sequences) of each solve a micro-batch has: forward, and of the adjoint (model.implicit)."""
        solver, mode = self.recipe.solver, self.recipe.gradient.mode
        history = solver.history if solver.method == "anderson" else 0
        adjoint = [(implied_products(self.recipe.architecture), max(4, history) if history else 0, True)]
        return [(self.iterations, history, solver.mixing == "sequence"), *adjoint * (mode == "adjoint")]

    @property
    def collectives(self) -> int:
        """All-gathers and reduce-scatters of an attractor block's forward: in and out, twice; cross-attention gathers y0 too."""
        return 5 if self.recipe.attractor.injection == "cross_attention" else 4

    def solves(self, share: Share) -> bool:
        return share.end and self.recipe.model.solves

    def loops(self, share: Share) -> bool:
        return share.end and self.recipe.model.loops

    def blocks(self, share: Share) -> tuple[float, float]:
        """Passes through ordinary blocks that a micro-batch makes on a stage, (forward, backward): its own, a loop's and its coda's."""
        own, loop = share.stop - share.first, self.recipe.loop
        if not self.loops(share):
            return own, own
        work = planned(self.recipe.architecture)
        once = own + loop.coda
        return once + loop.core * (work.evaluations + work.applications), once + loop.core * work.applications


def pipeline_time(stages: Sequence[float], micro_batches: int) -> float:
    """Of a 1F1B step whose stages take so long for a micro-batch."""
    return (micro_batches - 1) * max(stages) + sum(stages)


def efficiency(stages: Sequence[float], micro_batches: int) -> float:
    """Share of a step that the average stage works; the bubble is the rest."""
    return micro_batches * sum(stages) / (len(stages) * pipeline_time(stages, micro_batches))


@lru_cache(maxsize=4096)
def _link(gpu: Gpu, layout: Layout, axes: tuple[Axis, ...]) -> float:
    """Bytes a second and rank over the slowest group along `axes`: NVLink inside a node; between nodes as many adapters as a group has
    ranks on one, for rings go through all of them."""
    rates = []
    for group in layout.groups(*axes):
        nodes = [rank // gpu.node for rank in group]
        rates.append(gpu.nvlink if len(set(nodes)) == 1 else min(gpu.nvlink, gpu.network * min(map(nodes.count, nodes))))
    return min(rates) * gpu.link_share


@lru_cache(maxsize=4096)
def _neighbour_link(gpu: Gpu, layout: Layout) -> float:
    """Bytes a second between stages that follow each other."""
    return (gpu.nvlink if layout.ranks <= gpu.node else gpu.network) * gpu.link_share


def _device(case: _Case, stage: Stage, share: Share) -> float:
    """Seconds that a rank computes for a micro-batch: matrix products and elementwise traffic, or launching it all, whichever is longer."""
    train, m = case.recipe.train, case.recipe.model
    fused = 0.5 if train.compile else 1.0
    forward, backward = gpus.FORWARD_PASSES * fused * case.value_bytes, gpus.BACKWARD_PASSES * fused * case.value_bytes
    ahead, back = case.blocks(share)
    again = back * train.recompute
    moved = block_values(m, share.tensor, share.sequence_parallel) * (forward * (ahead + again) + backward * back)
    kernels = gpus.COMPILED_KERNELS if train.compile else gpus.KERNELS
    launches = float(kernels * (ahead + again + 2 * back) * (gpus.HOOKED if case.recipe.layout.zero == 3 else 1))
    if share.end:
        rows = (m.vocabulary_size or 0) / share.tensor
        accumulated = 18 * m.width * rows / (gpus.LOGITS_AT_ONCE / rows)  # the table's gradient, added up in fp32 once a chunk
        moved += rows * gpus.LOGIT_BYTES + accumulated
    if case.solves(share):
        layers = case.recipe.attractor.layers
        f = layers * block_values(m, share.tensor, divided=True, gated=True)
        moved += f * (forward * case.forwards + backward * case.backwards)
        moved += sum(count * mixing_passes(history) for count, history, _ in case.mixes) * 4 * m.width / share.tensor
        launches += kernels * layers * (case.forwards + 2 * case.backwards) + gpus.MIXING_KERNELS * sum(mix[0] for mix in case.mixes)
    device = case.tokens * (stage.flops / share.tensor / case.matrix_rate + moved / (case.gpu.hbm * case.gpu.hbm_share))
    return max(device, launches * case.gpu.launch)


def mixing_passes(history: int) -> int:
    """fp32 tensors as large as the state that an iteration reads or writes outside f, counted in model/fixed_point.py."""
    if not history:
        return 7  # the change, two norms, the best state
    dots = 1 + 2 * history + history * (history - 1) // 2
    return 7 + 3 * dots + 6 + 3 * history + 3


@dataclass(frozen=True)
class _Traffic:
    """Bytes a rank sends and seconds it takes."""

    bytes: float = 0.0
    seconds: float = 0.0


def _halves(case: _Case, count: float, calls: float) -> _Traffic:
    """`count` all-gathers or reduce-scatters of a micro-batch [b, s, w] over the tensor ranks (an all-reduce is two), in `calls`."""
    ranks = case.layout.tensor
    if ranks == 1:
        return _Traffic()
    sent = count * (ranks - 1) / ranks * case.tokens * case.recipe.model.width * case.value_bytes
    return _Traffic(sent, sent / _link(case.gpu, case.layout, ("tensor",)) + calls * case.gpu.latency)


def _backbone_traffic(case: _Case, share: Share) -> _Traffic:
    """Two all-reduces a block forward and two backward, one and a half more for recomputation; table and head two halves each."""
    divided = share.sequence_parallel
    ahead, back = case.blocks(share)
    again_halves = (3 if divided else 2) * case.recipe.train.recompute * back
    halves = 4 * (ahead + back) + again_halves + 2 * share.start + (2 + (case.solves(share) and not divided)) * share.end
    calls = (5 * (ahead + back) + again_halves if divided else 2 * (ahead + back) + again_halves / 2) + 2 * share.start + 3 * share.end
    chunks = case.tokens * (case.recipe.model.vocabulary_size or 0) / share.tensor / gpus.LOGITS_AT_ONCE if share.end else 0
    return _halves(case, halves, calls + 2 * chunks)


def _solve_traffic(case: _Case, passes: float, reductions: float) -> _Traffic:
    """Passes through f, either way: two all-gathers and two reduce-scatters a block. Small reductions (of residuals every iteration, of
    Gram matrices if mixing is over sequences) cost their latency."""
    count = case.recipe.attractor.layers * case.collectives * passes
    return _halves(case, count, count + reductions)


def _micro_batch(case: _Case, stage: Stage, share: Share) -> dict[str, _Traffic]:
    """One micro-batch on one stage, by part."""
    reductions = sum(count * (1 + bool(history and whole)) for count, history, whole in case.mixes)
    solve = _solve_traffic(case, case.forwards + case.backwards, reductions) if case.solves(share) else _Traffic()
    boundaries = (not share.start) + (not share.end)
    sent = case.tokens * case.recipe.model.width * case.value_bytes / (share.tensor if share.sequence_parallel else 1)
    return {
        "compute": _Traffic(0.0, _device(case, stage, share)),
        "backbone": _backbone_traffic(case, share),
        "solve": solve,
        "stages": _Traffic(boundaries * sent, 2 * boundaries * (sent / _neighbour_link(case.gpu, case.layout) + case.gpu.latency)),
    }


def _gradients(case: _Case, share: Share, micro_batch: float) -> _Traffic:
    """Over the data ranks a step: fp32 gradients, all-reduced by DeepSpeed at ZeRO 0 to 2 (at 2 for every micro-batch) and scattered at
    3; weights gathered after the update, at 3 twice a micro-batch and mostly behind it. Tied tables are added up over two stages."""
    zero, ranks, count = case.recipe.layout.zero, case.layout.data, case.micro_batches
    held = held_parameters(case.recipe.architecture, share).total * (ranks - 1) / ranks
    weights, link = held * case.value_bytes, _link(case.gpu, case.layout, ("data",))
    reduced = {0: 8 * held, 1: 8 * held, 2: 8 * held * count, 3: 4 * held * count}[zero]
    sent = reduced + weights * {0: 0, 1: 1, 2: 1, 3: 2 * count}[zero]
    seconds = sent / link + (case.gpu.latency if ranks > 1 else 0.0)
    if zero == 3:
        seconds = max((1 - case.gpu.overlap) * seconds, seconds - count * micro_batch)
    if case.layout.pipeline > 1 and case.recipe.model.tied_embeddings and (share.start or share.end):
        table = 4.0 * (case.recipe.model.vocabulary_size or 0) * case.recipe.model.width / share.tensor
        sent, seconds = sent + table, seconds + table / _neighbour_link(case.gpu, case.layout) + case.gpu.latency
    return _Traffic(sent, seconds)


def _optimizer(case: _Case, share: Share) -> _Traffic:
    """Elementwise updates of this rank's part, and Muon: every backbone matrix sent whole to one rank of the stage and back in bf16, and
    orthogonalised there."""
    m, settings = case.recipe.model, case.recipe.optimizer
    held = held_parameters(case.recipe.architecture, share)
    seconds = held.total * gpus.UPDATE_BYTES / (case.layout.data if case.recipe.layout.zero else 1) / (case.gpu.hbm * case.gpu.hbm_share)
    blocks = share.stop - share.first + (case.recipe.loop.core + case.recipe.loop.coda) * case.loops(share)
    if settings.name != "muon" or not blocks:
        return _Traffic(0.0, seconds)
    ranks = case.layout.data * case.layout.tensor if case.recipe.layout.zero else 1
    kv, hidden, w = m.key_value_heads * m.head_dim, m.hidden, m.width
    sides = [(w, w), (w, w), (kv, w), (kv, w), *[(min(w, hidden), max(w, hidden))] * (3 if m.mlp == "swiglu" else 2)]
    products = [settings.muon_steps * (4 * r * r * c + 2 * r**3) for r, c in sides]
    work = max(blocks * sum(products) / ranks, max(products))
    sent = 2 * 2 * held.backbone_matrices * share.tensor / ranks * (ranks - 1) / ranks
    link = _link(case.gpu, case.layout, ("data", "tensor"))
    return _Traffic(sent, seconds + work / case.matrix_rate + (sent / link + 2 * case.gpu.latency if ranks > 1 else 0.0))


def estimate(recipe: Recipe, layout: Layout, gpu: Gpu) -> Estimate:
    """A step of a complete recipe on `layout`. Raises Refusal when the batch does not divide over its data ranks."""
    case = _Case(recipe, layout, gpu)
    held = shares(recipe, layout)
    parts = [_micro_batch(case, stage, share) for stage, share in held]
    times = [sum(part.seconds for part in stage.values()) for stage in parts]
    slowest, count = times.index(max(times)), case.micro_batches
    reductions = [_gradients(case, share, time) for (_, share), time in zip(held, times, strict=True)]
    updates = [_optimizer(case, share) for _, share in held]
    seconds = {name: count * part.seconds for name, part in parts[slowest].items()}
    seconds |= {
        "bubble": sum(times) - max(times),
        "gradients": max(r.seconds for r in reductions),
        "optimizer": max(u.seconds for u in updates),
    }
    sent = {name: count * part.bytes for name, part in parts[slowest].items() if name != "compute"}
    sent |= {"gradients": reductions[slowest].bytes, "optimizer": updates[slowest].bytes}
    step = sum(seconds.values())
    behind = max(times) * 2 / 3 * (count if recipe.layout.zero == 2 else 1)  # backward is two thirds of a micro-batch
    tokens = recipe.train.global_batch * case.length
    a_token = flops(recipe.architecture, case.length, planned(recipe.architecture).evaluations).model
    peak = peak_flops(gpu.name, recipe.train.precision) or 0.0
    solved = recipe.model.solves
    return Estimate(
        gpu=gpu.name,
        seconds=seconds,
        sent=sent,
        step=step,
        step_overlapped=step - min(seconds["gradients"], behind),
        stage_seconds=times,
        block_bytes=_halves(case, 8, 0).bytes,
        iteration_bytes=_solve_traffic(case, 1, 1).bytes if solved else 0.0,
        tokens_per_second=tokens / step / layout.ranks,
        mfu=a_token * tokens / step / layout.ranks / peak,
    )
