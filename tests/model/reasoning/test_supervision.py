"""The carry: no gradient leaks, halted rows are replaced exactly once and in order, the halting rule, targets and records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.reasoning.config import SupervisionConfig
from model.reasoning.loss import stablemax_cross_entropy
from model.reasoning.reasoner import Thought
from model.reasoning.supervision import Carry, empty_carry, explore, refill, supervise
from tests.model.reasoning.support import CELLS, KINDS, VOCABULARY, begun, grids, lively, of_kind, reasoning

ROWS = 4
ZEROS = torch.zeros(ROWS, dtype=torch.int32)


def scripted(q_halt: Tensor, q_continue: Tensor, right: Tensor, answers: Tensor) -> Any:
    """A model whose halting logits and right cells [b, c] are given."""
    wrong = answers.long() % (VOCABULARY - 1) + 1
    logits = F.one_hot(torch.where(right, answers.long(), wrong), VOCABULARY).float()
    record = {"solver_evaluations": torch.tensor(2.0), "applications": torch.tensor(1.0)}
    return lambda latents, inputs, identifiers: Thought(latents, logits, q_halt, q_continue, None, record, q_halt)


def carried(steps: list[int]) -> Carry:
    rows = len(steps)
    latents = (torch.zeros(rows, 2, 2), torch.zeros(rows, 2, 2))
    return empty_carry(latents, CELLS)._replace(
        inputs=grids(rows), answers=grids(rows, 1), steps=torch.tensor(steps, dtype=torch.int32), halted=torch.zeros(rows, dtype=torch.bool)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=12))
def test_halted_rows_are_replaced_once_in_order_and_counted_once(pattern: list[list[bool]]) -> None:
    rows, cells, given_out = 5, 3, 0
    carry, running = empty_carry((torch.zeros(rows, 1, 1),), cells), [-1] * rows
    for number, halts in enumerate(pattern):
        freed = [row for row in range(rows) if carry.halted[row]]
        fresh = torch.arange(given_out, given_out + rows)  # puzzle n: inputs n, answers n + 1, identifier n; those too many must be ignored
        fresh[len(freed) :] = 99
        start = (torch.full((rows, 1, 1), float(number + 1)),)
        before = carry
        carry = refill(carry, *((fresh + extra).to(torch.uint8)[:, None].expand(rows, cells) for extra in (0, 1)), fresh, start)
        for place, row in enumerate(freed):
            running[row] = given_out + place
        given_out += len(freed)
        assert carry.inputs[:, 0].tolist() == carry.identifiers.tolist() == running
        assert carry.answers[:, -1].tolist() == [puzzle + 1 for puzzle in running]
        for row in range(rows):
            kept = row not in freed
            assert carry.steps[row] == (before.steps[row] if kept else 0)
            assert carry.latents[0][row] == (before.latents[0][row] if kept else number + 1)
        assert not carry.halted.any()
        carry = carry._replace(halted=torch.tensor(halts), steps=carry.steps + 1)
    assert carry.inputs.dtype == carry.answers.dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_the_carry_holds_no_gradient(kind: str) -> None:
    config = of_kind(kind)
    model = lively(config)
    carry = begun(model, grids(ROWS), grids(ROWS, 1))
    first = supervise(model, carry, config.supervision, ZEROS).carry
    assert not any(tensor.requires_grad for tensor in (*first.latents, *first[1:]))
    torch.manual_seed(1)  # of path noise
    done = supervise(model, first, config.supervision, ZEROS)
    done.loss.backward()  # a second step differentiates itself alone
    alone = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(alone) == len(list(model.parameters()))
    fresh = lively(config)  # the same step, from copies of what was carried, in a model that took no step before
    copies = first._replace(latents=tuple(latent.clone() for latent in first.latents))
    torch.manual_seed(1)
    supervise(fresh, copies, config.supervision, ZEROS).loss.backward()
    for got, parameter in zip(alone, fresh.parameters(), strict=True):
        assert parameter.grad is not None
        assert got.equal(parameter.grad)


def test_a_row_halts_at_the_limit_or_when_its_head_says_so() -> None:
    carry = carried([0, 0, 2, 2])
    model = scripted(torch.tensor([1.0, -1, 1, -1]), torch.zeros(4), torch.ones(4, CELLS, dtype=torch.bool), carry.answers)
    done = supervise(model, carry, SupervisionConfig(steps=3), ZEROS)
    assert done.carry.halted.tolist() == [True, False, True, True]
    assert done.carry.steps.tolist() == [1, 1, 3, 3]
    free = supervise(model, carry, SupervisionConfig(steps=16), torch.tensor([2, 0, 4, 0], dtype=torch.int32))
    assert free.carry.halted.tolist() == [False, False, False, False]  # exploring rows may not halt yet
    later = supervise(model, carry, SupervisionConfig(steps=16), torch.tensor([1, 0, 3, 0], dtype=torch.int32))
    assert later.carry.halted.tolist() == [True, False, True, False]


def test_exploration_is_drawn_as_published() -> None:
    config = SupervisionConfig(steps=6, exploration=0.25)
    least = explore(torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0)), config)
    assert least.dtype == torch.int32
    counts = least.bincount(minlength=7) / 20_000
    assert counts[1] == 0
    assert float(counts[0]) == pytest.approx(0.75, abs=0.015)  # five deviations of a share of 20,000
    assert counts[2:].tolist() == pytest.approx([0.05] * 5, abs=0.008)
    assert not explore(torch.rand(2, 8), SupervisionConfig(steps=1, exploration=1.0)).any()
    assert not explore(torch.rand(2, 8), SupervisionConfig(exploration=0.0)).any()
    assert explore(torch.full((2, 1), 1 - 2**-24), SupervisionConfig(exploration=1.0)).tolist() == [16]


def test_loss_and_record_are_their_definitions() -> None:
    carry, generator = carried([0, 1, 2, 2]), torch.Generator().manual_seed(0)
    right = torch.rand(ROWS, CELLS, generator=generator) < 0.5
    right[2:] = True
    q_halt, q_continue = torch.tensor([0.5, -0.5, 2.0, -2.0]), torch.tensor([1.0, -1.0, 0.5, 0.1])
    model = scripted(q_halt, q_continue, right, carry.answers)
    exact = torch.tensor([0.0, 0, 1, 1])
    logits = model(carry.latents, None, None).logits
    cells = stablemax_cross_entropy(logits, carry.answers).mean(-1)
    halting = F.binary_cross_entropy_with_logits(q_halt, exact, reduction="none")
    done = supervise(model, carry, SupervisionConfig(steps=3), ZEROS)
    torch.testing.assert_close(done.loss, (cells + 0.5 * halting).mean())
    got = {name: float(value) for name, value in done.record.items()}
    assert got["finished"] == 3  # rows 0 (its head), 2 and 3 (the limit)
    assert got["finished_cells"] == pytest.approx(float(right[0].float().mean()) + 2)
    assert (got["finished_exact"], got["finished_halting"], got["finished_steps"]) == (2, 1, 1 + 3 + 3)
    assert (got["solver_evaluations"], got["applications"]) == (2, 1)
    target = torch.stack([q_continue[0].maximum(q_halt[0]), q_continue[1].maximum(q_halt[1]), q_halt[2], q_halt[3]]).sigmoid()
    going_on = F.binary_cross_entropy_with_logits(q_continue, target, reduction="none")
    learned = supervise(model, carry, SupervisionConfig(steps=3, halting="q_learning"), ZEROS)
    torch.testing.assert_close(learned.loss, (cells + 0.5 * (halting + going_on)).mean())
    assert learned.carry.halted.tolist() == [False, True, True, True]  # q_halt above q_continue, or the limit
    assert float(learned.record["solver_evaluations"]) == 4  # the target pass costs what a pass costs


def test_a_penalty_joins_the_loss() -> None:
    config = reasoning(kind="attractor", gradient={"jacobian_penalty": 0.1})
    model = lively(config)
    carry = begun(model, grids(ROWS), grids(ROWS, 1))
    torch.manual_seed(0)
    penalty = model(carry.latents, carry.inputs, carry.identifiers).penalty
    torch.manual_seed(0)
    done = supervise(model, carry, config.supervision, ZEROS)
    assert float(penalty.detach()) > 0
    want = done.record["cross_entropy"] + 0.5 * done.record["halting_loss"] + penalty.detach()
    torch.testing.assert_close(done.loss.detach(), want)
