"""The optimizer of a reasoner: AdamW of all but the puzzle embedding, which is stepped by the sign of its gradient."""

from __future__ import annotations

import torch

from model.reasoning.config import ReasonerConfig, ReasoningConfig
from model.reasoning.reasoner import build
from model.reasoning.roles import parameter_roles
from pretrain.optimizer import build_puzzle_optimizer, puzzle_groups, sign_step
from pretrain.reasoning.sections import PuzzleOptimizerSection

SETTINGS = PuzzleOptimizerSection(lr=1e-3, puzzle_lr=1e-2, weight_decay=1.0, puzzle_weight_decay=0.5, betas=[0.9, 0.95])
TINY = ReasonerConfig(vocabulary_size=6, cells=4, width=8, heads=2, layers=1, mlp_width=8, identifiers=3, prefix=2)


def test_every_parameter_is_in_one_group_and_everything_decays() -> None:
    model = build(ReasoningConfig(model=TINY))
    network, table = puzzle_groups(model, parameter_roles(model), SETTINGS)
    assert table["params"] == [model.puzzle_embedding.weight]  # type: ignore[union-attr]
    assert len(network["params"]) + 1 == len(list(model.parameters()))
    assert [(group["update"], group["lr"], group["weight_decay"]) for group in (network, table)] == [
        ("adamw", 1e-3, 1.0),
        ("sign", 1e-2, 0.5),
    ]


def test_a_model_without_a_puzzle_embedding_has_one_group() -> None:
    model = build(ReasoningConfig(model=ReasonerConfig(vocabulary_size=6, cells=4, width=8, heads=2, layers=1, mlp_width=8, prefix=0)))
    assert [group["name"] for group in puzzle_groups(model, parameter_roles(model), SETTINGS)] == ["network"]


def test_sign_step_leaves_what_has_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]]))
    weight.grad = torch.tensor([[1e-9, -7.0, 0.0], [0.0, 0.0, 0.0]])
    sign_step([weight], 0.1, 0.5)
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95 - 0.1, -1.9 + 0.1, 3.0], [4.0, 5.0, 6.0]]))


def test_only_the_rows_of_a_batch_move_and_the_average_follows() -> None:
    model = build(ReasoningConfig(model=TINY))
    optimizer = build_puzzle_optimizer(model, parameter_roles(model), SETTINGS)
    table = model.puzzle_embedding.weight  # type: ignore[union-attr]
    before = table.detach().clone()
    thought = model(model.start(2), torch.ones(2, 4, dtype=torch.uint8), torch.tensor([2, 0]))
    thought.logits.square().sum().backward()
    optimizer.step()
    moved = (table != before).any(dim=1)
    assert moved.tolist() == [True, False, True]
    assert set(optimizer.state[table]) == {"ema"}
    torch.testing.assert_close(optimizer.state[table]["ema"], torch.lerp(before, table.detach(), 1 - 0.999))
