"""Parameter groups by role, and MuonAdamW against torch's AdamW and a plain Muon, clipping and skipping included."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import AttractorConfig, BackboneConfig, ModelConfig
from model.language_model import build
from model.roles import Role, parameter_roles
from pretrain.optimizer import MuonAdamW, apply_schedule, build_optimizer, parameter_groups
from pretrain.sections import OptimizerSection, ScheduleSection

SETTINGS = OptimizerSection(
    name="muon",
    lr=0.01,
    betas=[0.8, 0.95],
    eps=1e-8,
    weight_decay=0.1,
    muon_lr=0.02,
    muon_weight_decay=0.2,
    attractor_lr_scale=0.5,
    attractor_weight_decay=0.3,
    embedding_lr_scale=2.0,
)
ROLES = {"table": Role.EMBEDDING, "tall": Role.BACKBONE_MATRIX, "wide": Role.BACKBONE_MATRIX, "gain": Role.BACKBONE_VECTOR}
ROLES |= {"map": Role.ATTRACTOR_MATRIX, "gate": Role.ATTRACTOR_VECTOR}


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {"table": (9, 5), "tall": (11, 5), "wide": (5, 11), "gain": (5,), "map": (5, 5), "gate": (5,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def by_role(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


def test_groups_follow_roles() -> None:
    groups = by_role(parameter_groups(Weights(), ROLES, SETTINGS))
    found = {name: (group["update"], group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found == {
        "embedding": ("adamw", 0.02, 0.0),
        "backbone_matrix": ("muon", 0.02, 0.2),
        "backbone_vector": ("adamw", 0.01, 0.0),
        "attractor_matrix": ("adamw", 0.005, 0.3),
        "attractor_vector": ("adamw", 0.005, 0.0),
    }
    adamw = by_role(parameter_groups(Weights(), ROLES, SETTINGS.model_copy(update={"name": "adamw"})))["backbone_matrix"]
    assert (adamw["update"], adamw["lr"], adamw["weight_decay"]) == ("adamw", 0.01, 0.1)


def test_a_real_model_has_every_parameter_in_one_group_and_muon_only_in_the_backbone() -> None:
    config = ModelConfig(BackboneConfig(vocabulary_size=32, width=16, heads=2, backbone_layers=2), AttractorConfig(layers=1))
    model = build(config, device="meta")
    optimizer = MuonAdamW(parameter_groups(model, parameter_roles(model), SETTINGS))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert optimizer.muon_tensors == sum(1 for p in model.backbone.parameters() if p.ndim == 2) > 0


def test_a_parameter_without_a_role_is_refused() -> None:
    with pytest.raises(ValueError, match="gate"):
        parameter_groups(Weights(), {name: role for name, role in ROLES.items() if name != "gate"}, SETTINGS)


def reference_step(weights: dict[str, Tensor], gradients: dict[str, Tensor], state: dict[str, Any], step: int, decay: float) -> None:
    """The whole update again, in float64, written from the formulas."""
    rates = {"table": 0.02, "gain": 0.01, "map": 0.005, "gate": 0.005}
    for name, g in gradients.items():
        p, s = weights[name], state.setdefault(name, {"m": torch.zeros_like(g), "v": torch.zeros_like(g)})
        if name in rates:
            p *= 1 - rates[name] * (0.3 if name == "map" else 0.0)
            s["m"] = 0.8 * s["m"] + 0.2 * g
            s["v"] = 0.95 * s["v"] + 0.05 * g**2
            p -= rates[name] * (s["m"] / (1 - 0.8**step)) / ((s["v"] / (1 - 0.95**step)).sqrt() + 1e-8)
            continue
        s["m"] = 0.95 * s["m"] + 0.05 * g
        u, values, vh = torch.linalg.svd(0.95 * s["m"] + 0.05 * g, full_matrices=False)
        values = values / (values.norm() + 1e-7)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        update = math.sqrt(max(1.0, g.shape[0] / g.shape[1])) * (u * values) @ vh
        p -= 0.02 * (update + decay * p * (update * p > 0))


def test_updates_equal_the_formulas_in_float64() -> None:
    """fp32 against float64 over 6 steps. Newton-Schulz multiplies a rounding error of 1e-7 by at most 485, and the weights move
    by a few hundredths of their size, hence 1e-5."""
    model = Weights()
    optimizer = build_optimizer(model, ROLES, SETTINGS)
    optimizer.guard_gradients(1.0)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    state: dict[str, Any] = {}
    for step in range(6):
        gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        apply_schedule(optimizer, step * 100, ScheduleSection(shape="constant"), 1000)
        optimizer.step()
        assert optimizer._global_grad_norm == pytest.approx(norm, rel=1e-6)
        reference_step(weights, {name: g.double() / (norm + 1e-6) for name, g in gradients.items()}, state, step + 1, 0.2 * (1 - step / 10))
    for name, p in model.named_parameters():
        assert (p.double() - weights[name]).norm() / weights[name].norm() < 1e-5, name


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs(fused: bool) -> None:
    ours, theirs = Weights(), Weights()
    optimizer = build_optimizer(ours, ROLES, SETTINGS.model_copy(update={"name": "adamw"}), fused=fused)
    keys = ("params", "lr", "betas", "eps", "weight_decay")
    groups = parameter_groups(theirs, ROLES, SETTINGS.model_copy(update={"name": "adamw"}))
    reference = torch.optim.AdamW([{key: group[key] for key in keys} for group in groups], fused=fused)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_non_finite_gradient_changes_nothing() -> None:
    model = Weights()
    optimizer = build_optimizer(model, ROLES, SETTINGS)
    optimizer.guard_gradients(1.0)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.get_parameter("gate").grad = torch.full((5,), torch.inf)
    optimizer.step()
    assert optimizer.overflow
    assert optimizer._global_grad_norm == math.inf
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer.overflow


def test_state_dict_resumes_bit_exactly() -> None:
    first, second = Weights(), Weights()
    gradients = [[torch.randn_like(p) for p in first.parameters()] for _ in range(4)]

    def run(model: Weights, optimizer: MuonAdamW, steps: list[list[Tensor]]) -> None:
        for step in steps:
            for p, g in zip(model.parameters(), step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    straight = build_optimizer(first, ROLES, SETTINGS.model_copy(update={"ema": 0.9}))
    run(first, straight, gradients)
    early = build_optimizer(second, ROLES, SETTINGS.model_copy(update={"ema": 0.9}))
    run(second, early, gradients[:2])
    late = build_optimizer(second, ROLES, SETTINGS.model_copy(update={"ema": 0.9}))
    late.load_state_dict(copy.deepcopy(early.state_dict()))
    run(second, late, gradients[2:])
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(straight.state[p]["ema"], late.state[q]["ema"])


def test_schedule_scales_every_group_from_its_own_rate() -> None:
    optimizer = build_optimizer(Weights(), ROLES, SETTINGS)
    assert apply_schedule(optimizer, 750, ScheduleSection(), 1000) == 0.5
    groups = by_role(optimizer.param_groups)
    assert (groups["embedding"]["lr"], groups["backbone_matrix"]["lr"]) == (0.01, 0.01)
    assert groups["backbone_matrix"]["weight_decay"] == pytest.approx(0.05)
    assert groups["attractor_matrix"]["weight_decay"] == 0.3


def test_a_flat_muon_partition_without_its_table_is_refused() -> None:
    model = Weights()
    optimizer = build_optimizer(model, ROLES, SETTINGS)
    flat = torch.zeros(110, requires_grad=True)
    flat.grad = torch.ones(110)
    by_role(optimizer.param_groups)["backbone_matrix"]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"zero\.attach"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="2 matrices"):
        optimizer.attach_pieces({})
