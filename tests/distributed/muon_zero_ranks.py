"""What every rank runs for test_muon_zero: a small model of odd shapes, trained through DeepSpeed and without it.

The reference knows nothing of DeepSpeed: it takes the ranks' micro-batches one after the other in one process, sums their
gradients in fp32, and steps `MuonAdamW` on plain fp32 parameters (which tests/pretrain checks against float64).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from model.roles import Role
from pretrain import zero
from pretrain.ema import averaged_weights
from pretrain.layout import Layout
from pretrain.mesh import Mesh
from pretrain.optimizer import MuonAdamW, apply_schedule, build_optimizer
from pretrain.sections import OptimizerSection, ScheduleSection

SETTINGS: dict[str, Any] = {
    "lr": 0.01,
    "betas": [0.8, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "muon_lr": 0.02,
    "muon_momentum": 0.9,
    "muon_steps": 5,
    "muon_weight_decay": 0.2,
    "attractor_lr_scale": 0.5,
    "attractor_weight_decay": 0.1,
    "embedding_lr_scale": 2.0,
    "clip": 0.1,
}
SCHEDULE = ScheduleSection(warmup=0.0, decay=0.5)
VOCABULARY, WIDTH, STEPS, RANKS, ACCUMULATION, MICRO = 13, 7, 5, 2, 2, 3


@dataclass(frozen=True)
class Case:
    """One engine: ZeRO stage, update, precision, and what differs from the common DeepSpeed settings."""

    stage: int
    name: str = "muon"
    precision: str = "fp32"
    ema: float | None = None
    persistent: bool = False
    sub_group: int = 10**9
    communication: str = "fp32"


class Toy(nn.Module):
    """Every role once or more; no size divides by two, and matrices straddle any cut in two."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.tall = nn.Linear(WIDTH, 11, bias=False)
        self.wide = nn.Linear(11, WIDTH, bias=False)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.map = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.wide(torch.relu(self.tall(x)))
        x = torch.tanh(self.square(x)) * self.gain
        x = x + torch.tanh(self.map(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


ROLES = {
    "embedding.weight": Role.EMBEDDING,
    "tall.weight": Role.BACKBONE_MATRIX,
    "wide.weight": Role.BACKBONE_MATRIX,
    "square.weight": Role.BACKBONE_MATRIX,
    "gain": Role.BACKBONE_VECTOR,
    "map.weight": Role.ATTRACTOR_MATRIX,
    "map.bias": Role.ATTRACTOR_VECTOR,
    "head.weight": Role.HEAD,
}


def batch(step: int, micro: int, replica: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + replica)
    window = torch.randint(VOCABULARY, (MICRO, 6), generator=generator)
    return window[:, :-1], window[:, 1:]


def settings_of(case: Case) -> OptimizerSection:
    return OptimizerSection(**{**SETTINGS, "name": case.name, "ema": case.ema})


def reference(case: Case, masters: nn.Module, roles: dict[str, Role], replicas: int) -> dict[str, Any]:
    """Losses, norms, fp32 weights and averages of one process on plain torch, from the weights of `masters`."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with torch.no_grad():
        for master in masters.parameters():  # as DeepSpeed's masters: copies of the cast weights
            master.copy_(master.to(dtype))
    optimizer = build_optimizer(masters, roles, settings_of(case))
    optimizer.guard_gradients(SETTINGS["clip"])
    losses, norms = [], []
    for step in range(STEPS):
        worker = copy.deepcopy(masters).to(dtype)
        total = 0.0
        for replica in range(replicas):
            for micro in range(ACCUMULATION):
                worker.zero_grad()
                loss = worker(*batch(step, micro, replica))
                (loss / ACCUMULATION).backward()
                total += loss.item() / (replicas * ACCUMULATION)
                for master, parameter in zip(masters.parameters(), worker.parameters(), strict=True):
                    assert parameter.grad is not None
                    share = parameter.grad.float() / replicas
                    master.grad = share if master.grad is None else master.grad + share
        apply_schedule(optimizer, step, SCHEDULE, STEPS)
        optimizer.step()
        losses.append(total)
        norms.append(optimizer._global_grad_norm)
        masters.zero_grad()
    averages = {name: optimizer.state[p]["ema"] for name, p in masters.named_parameters()} if case.ema else {}
    weights = {name: p.detach() for name, p in masters.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "averages": averages}


def deepspeed_config(case: Case) -> dict[str, Any]:
    zero_settings: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3:
        threshold = 10**6 if case.persistent else 0
        zero_settings |= {"sub_group_size": case.sub_group, "stage3_param_persistence_threshold": threshold}
        zero_settings |= {"memory_efficient_linear": False}  # which replaces F.linear in the whole process, with other roundings
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0 if case.stage == 0 and case.precision == "fp32" else SETTINGS["clip"],
        "zero_optimization": zero_settings,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": case.communication,
        "steps_per_print": None,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "bf16" if case.stage == 0 else "fp32"}
    return config


def make_engine(case: Case) -> Any:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Toy()
    optimizer = build_optimizer(model, ROLES, settings_of(case))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    zero.attach(engine, SETTINGS["clip"], Mesh(Layout(data=RANKS), dist.get_rank()))
    return engine


def train(engine: Any, first: int, last: int) -> tuple[list[float], list[float]]:
    return train_replica(engine, first, last, dist.get_rank())


def train_replica(engine: Any, first: int, last: int, replica: int) -> tuple[list[float], list[float]]:
    """Losses over all ranks and gradient norms of steps first:last, on the batches of one replica."""
    losses, norms = [], []
    for step in range(first, last):
        apply_schedule(zero.client_optimizer(engine), step, SCHEDULE, STEPS)
        total = torch.zeros(())
        for micro in range(ACCUMULATION):
            loss = engine(*batch(step, micro, replica))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / ACCUMULATION
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """fp32 master weights by name, whole, on every rank."""
    wrapper = engine.optimizer
    named = list(engine.module.named_parameters())
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        masters = {id(w): m for ws, ms in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) for w, m in zip(ws, ms, strict=True)}
        return {name: masters[id(p)].detach().clone() for name, p in named}
    if isinstance(wrapper, MuonAdamW):
        return {name: p.detach().clone() for name, p in named}
    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named}


def module_weights(engine: Any) -> dict[str, Tensor]:
    """The weights the module computes with, whole."""
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=sharded):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest ||found - wanted|| / ||wanted|| over tensors."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def parity(case: Case) -> dict[str, Any]:
    """How far an engine's five steps are from the reference's."""
    wanted = reference(case, Toy(), ROLES, RANKS)
    engine = make_engine(case)
    start = whole_weights(engine)
    losses, norms = train(engine, 0, STEPS)
    weights = whole_weights(engine)
    moved = min(float((weights[name] - start[name]).norm() / start[name].norm()) for name in weights)
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "muon_tensors": zero.client_optimizer(engine).muon_tensors,
        "weights": worst(weights, wanted["weights"]),
        "moved": moved,
        "losses": max(abs(a / b - 1) for a, b in zip(losses, wanted["losses"], strict=True)),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, wanted["norms"], strict=True)),
        "smallest_norm": min(norms),
    }
    engine.destroy()
    return result


def skipped(case: Case) -> dict[str, Any]:
    """What a non-finite gradient on one rank does: nothing may change, and every rank must know."""
    engine = make_engine(case)
    train(engine, 0, 1)
    before = whole_weights(engine)
    for micro in range(ACCUMULATION):
        loss = engine(*batch(1, micro, dist.get_rank()))
        engine.backward(loss * (math.nan if dist.get_rank() == 1 else 1.0))
        engine.step()
    applied, norm = engine.was_step_applied(), float(engine.get_global_grad_norm())
    unchanged = all(torch.equal(before[name], value) for name, value in whole_weights(engine).items())
    losses, _ = train(engine, 1, 2)
    result = {"applied": applied, "finite": math.isfinite(norm), "unchanged": unchanged, "goes_on": math.isfinite(losses[0])}
    engine.destroy()
    return result


def resumed(case: Case, folder: str) -> dict[str, Any]:
    """5 steps against 3 steps, a checkpoint, a new engine and 2 more steps: bits must agree, averages included."""
    straight = make_engine(case)
    losses, norms = train(straight, 0, STEPS)
    wanted = [t.detach().clone() for t in zero.masters(straight)]
    straight.destroy()

    first = make_engine(case)
    train(first, 0, 3)
    first.save_checkpoint(folder, tag="three")
    first.destroy()
    second = make_engine(case)
    second.load_checkpoint(folder, tag="three")
    again, again_norms = train(second, 3, STEPS)
    same = all(torch.equal(a, b) for a, b in zip(wanted, zero.masters(second), strict=True))
    result: dict[str, Any] = {"weights": same, "losses": again == losses[3:], "norms": again_norms == norms[3:]}
    averages = reference(case, Toy(), ROLES, RANKS)["averages"]
    before = module_weights(second)
    with averaged_weights(second):
        inside = module_weights(second)
    after = module_weights(second)
    result["average"] = worst(inside, averages)
    result["apart"] = worst(before, averages)
    result["restored"] = all(torch.equal(before[name], after[name]) for name in before)
    second.destroy()
    return result


def all_cases(parities: list[dict[str, Any]], skips: list[dict[str, Any]], resumes: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "parity": [parity(Case(**case)) for case in parities],
        "skipped": [skipped(Case(**case)) for case in skips],
        "resumed": [resumed(Case(**case), str(Path(folder, str(index)))) for index, case in enumerate(resumes)],
    }
