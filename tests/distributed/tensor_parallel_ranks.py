"""What every tensor rank runs for test_tensor_parallel.py: the sharded model against the whole one in float64, and what it sends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings, vocab_parallel_cross_entropy
from torch import Tensor

from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig, SolverConfig
from model.fixed_point import Mixer
from model.language_model import LanguageModel, build
from model.loss import IGNORE
from pretrain.layout import Layout
from pretrain.mesh import Mesh, connect
from pretrain.runtime import process_group
from pretrain.sections import TrainSection
from pretrain.tensor_parallel import TensorParallelLayers
from tests.distributed.test_tensor_parallel import BATCH, BLOCKS, LENGTH, WIDTH

VOCABULARY = 64
BACKBONE = BackboneConfig(vocabulary_size=VOCABULARY, width=WIDTH, heads=4, kv_heads=4, backbone_layers=2, zero_output_init=False)
GENTLE = AttractorConfig(layers=BLOCKS, gate_initial=0.1)
TIGHT = SolverConfig(tolerance=1e-12, max_iterations=60, patience=60)


def checks(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything, in one launch."""
    with process_group(TrainSection(tokens=1, device="cpu")) as device:
        mesh = connect(Layout(tensor=dist.get_world_size()), device)
        return {
            "against_whole": [_against_whole(mesh, case) for case in cases],
            "skewed": [_skewed(mesh, kind) for kind in ("noise", "nan", "late")],
            "sent": _sent(mesh),
            "cross_entropy": _cross_entropy(mesh),
        }


def _config(case: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        replace(BACKBONE, **case.get("model", {})),
        replace(GENTLE, **case.get("attractor", {})),
        replace(TIGHT, **case.get("solver", {})),
        GradientConfig(**case.get("gradient", {})),
    )


def _layers(mesh: Mesh, divided: bool) -> TensorParallelLayers:
    assert mesh.tensor_group is not None
    return TensorParallelLayers(mesh.tensor_group, divided)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    rows[0] = 7
    targets = rows[:, 1:].clone()
    targets[2, 11:] = IGNORE
    return rows[:, :-1], targets, (rows[:, :-1] == 3).cumsum(1).int()


def _loss_and_gradients(model: LanguageModel) -> tuple[float, dict[str, Tensor]]:
    tokens, targets, documents = _batch()
    loss, _ = model(tokens, targets, documents)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _against_whole(mesh: Mesh, case: dict[str, Any]) -> dict[str, float]:
    """Relative errors, in float64, of loss, worst gradient, and losses by depth (strict among them)."""
    config, layers = _config(case), _layers(mesh, case.get("divided", False))
    whole = build(config, dtype=torch.float64, seed=1)
    own = build(config, layers=layers, dtype=torch.float64, seed=1, recompute=case.get("recompute", False))
    assert all(
        torch.equal(layers.shard(parameter, mine), mine) for parameter, mine in zip(whole.parameters(), own.parameters(), strict=True)
    ), "first weights are not shards of the whole model's"
    loss, gradients = _loss_and_gradients(whole)
    own_loss, own_gradients = _loss_and_gradients(own)
    parameters = dict(own.named_parameters())
    assert gradients.keys() == own_gradients.keys()
    errors = {
        name: float((layers.shard(gradient, parameters[name]) - own_gradients[name]).norm() / gradient.norm().clamp_min(1e-300))
        for name, gradient in gradients.items()
    }
    tokens, targets, documents = _batch()
    depths = (0, 1, 3, "auto", "strict")
    with torch.no_grad():
        _, want = whole(tokens, targets, documents, depths)
        _, got = own(tokens, targets, documents, depths)
    assert want.keys() == got.keys()
    evaluated = max(float((want[key] - got[key]).abs().max()) for key in want if key.startswith(("nll", "proposal")))
    return {"loss": abs(loss - own_loss) / loss, "gradient": max(errors.values()), "evaluated": evaluated}


def _skewed(mesh: Mesh, kind: str) -> list[float]:
    """Iterations by sequence when the last rank's map is disturbed: they must agree, and nobody may wait."""
    config = _config({"solver": {"tolerance": 1e-4, "max_iterations": 25, "patience": 4}})
    model = build(config, layers=_layers(mesh, False), seed=1)
    assert model.refine is not None
    attractor, last = model.refine.attractor, mesh.rank == mesh.layout.ranks - 1
    calls = 0

    def disturbed(y: Tensor, y0: Tensor, context: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = type(attractor).forward(attractor, y, y0, context)
        if last and kind == "noise":
            value = value * (1 + 1e-2 * torch.randn_like(value))
        if last and kind == "nan" and calls > 2:
            value = value * float("nan")
        if last and kind == "late":
            time.sleep(0.05)
        return value

    with patch.object(attractor, "forward", disturbed), torch.no_grad():
        tokens, _, _ = _batch()
        refined = model.refine(*model.propose(tokens, None))
    return refined.solution.iterations.tolist()


@contextmanager
def _counted(sent: list[tuple[str, int]]) -> Iterator[None]:
    def counting(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            sent.append((name, arguments[0].numel()))
            return original(*arguments, **options)

        return call

    with (
        patch.object(mappings, "dist_all_gather_func", counting("gather", mappings.dist_all_gather_func)),
        patch.object(mappings, "dist_reduce_scatter_func", counting("scatter", mappings.dist_reduce_scatter_func)),
        patch.object(dist, "all_reduce", counting("reduce", dist.all_reduce)),
    ):
        yield


def _sent(mesh: Mesh) -> dict[str, Any]:
    """Collectives of one solve of 4 evaluations without early stopping, and the shapes of what Anderson keeps."""
    config = _config({"solver": {"tolerance": 1e-30, "max_iterations": 4, "patience": 9, "compaction": False}})
    model = build(config, layers=_layers(mesh, False), seed=1)
    assert model.refine is not None
    kept: list[list[int]] = []
    original = Mixer.next

    def watched(mixer: Mixer, *arguments: Tensor) -> Tensor:
        result = original(mixer, *arguments)
        kept.extend(list(tensor.shape) for pair in mixer.differences for tensor in pair)
        return result

    tokens, _, _ = _batch()
    sent: list[tuple[str, int]] = []
    with torch.no_grad(), patch.object(Mixer, "next", watched):
        proposal, context = model.propose(tokens, None)
        with _counted(sent):
            model.refine(proposal, context)
    return {"sent": sent, "kept": kept}


def _cross_entropy(mesh: Mesh) -> dict[str, float]:
    """Ours against megatron's vocab-parallel cross-entropy on the same shards: loss, d hidden, d weight."""
    layers = _layers(mesh, False)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(11, 8, generator=generator)
    weight = torch.randn(VOCABULARY, 8, generator=generator).chunk(mesh.layout.tensor)[mesh.where.tensor]
    targets = torch.randint(VOCABULARY, (11,), generator=generator)
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        entered = layers.enter(h)
        if ours:
            loss = layers.cross_entropy_sum(entered, w, targets)
        else:
            loss = vocab_parallel_cross_entropy((entered @ w.T)[:, None], targets[:, None]).sum()
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append((loss.detach(), h.grad, w.grad))
    with torch.no_grad():
        tokens = layers.cross_entropy_tokens(hidden, weight, targets).sum()
    (loss, dh, dw), (want, want_dh, want_dw) = results
    return {
        "loss": float((loss - want).abs() / want),
        "tokens": float((tokens - want).abs() / want),
        "hidden": float((dh - want_dh).abs().max()),
        "weight": float((dw - want_dw).abs().max()),
    }
