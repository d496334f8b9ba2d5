"""The whole model: what it returns, what it records, precision of the solve under bf16, and the solvers on trained maps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import SolverConfig
from model.fixed_point import solve
from model.language_model import LanguageModel, build
from model.loss import IGNORE
from tests.model.measure import SOLVERS, TOLERANCES, effort, held_out_maps
from tests.model.support import configuration, map_and_start, random_tokens, relative, text_batch

KEYS = {"solver_iterations", "solver_evaluations", "solver_residual", "solver_converged", "solver_fallbacks"}


def masked_targets(batch: int = 2, length: int = 8) -> Tensor:
    targets = random_tokens(batch, length, seed=1)
    targets[0, 5:] = IGNORE
    return targets


@pytest.mark.parametrize("kind", ["transformer", "attractor"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_mean_over_predicted_tokens(kind: str, tied: bool) -> None:
    fixed = {"method": "picard", "min_iterations": 4, "max_iterations": 4}
    config = configuration(model={"kind": kind, "tied_embeddings": tied}, solver=fixed)
    model, tokens, targets = build(config, dtype=torch.float64), random_tokens(2, 8), masked_targets()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    loss, record = model(tokens, targets)
    # in training the output is one application deeper than the solve: 4 evaluations and one more
    logits = model.logits(tokens, depth=5).double() if kind == "attractor" else model.logits(tokens).double()
    rebuilt = naive_logits(model, tokens, 5 if kind == "attractor" else 0)
    torch.testing.assert_close(logits, rebuilt, rtol=1e-5, atol=1e-6)  # logits() returns fp32
    torch.testing.assert_close(loss, F.cross_entropy(rebuilt.flatten(0, 1), targets.flatten(), ignore_index=IGNORE), rtol=1e-7, atol=0)
    if kind == "attractor":
        assert set(record) == KEYS | {"cross_entropy", "products", "applications"}
        assert torch.equal(record["cross_entropy"], loss.detach())
    else:
        assert record == {}
    assert not any(value.requires_grad for value in record.values())


@torch.no_grad()
def naive_logits(model: LanguageModel, tokens: Tensor, depth: int) -> Tensor:
    """Proposal, `depth` applications of f, norm and head, by hand."""
    table = model.embedding.weight if model.head is None else model.head.weight
    y = model.propose(tokens, None)[0]
    if model.refine is not None:
        f, y = map_and_start(model, tokens)
        for _ in range(depth):
            y = f(y)
    normed = y / (y.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight
    return normed @ table.T  # type: ignore[operator]


def test_a_batch_with_nothing_to_predict_costs_nothing() -> None:
    model, tokens = build(configuration()), random_tokens(2, 8)
    loss, _ = model(tokens, torch.full_like(tokens, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["neumann", "adjoint"])
def test_products_are_in_the_record_once_backward_has_run(mode: str) -> None:
    config = configuration(gradient={"mode": mode, "steps": 3, "tolerance": 1e-3})
    loss, record = build(config)(random_tokens(2, 8), random_tokens(2, 8, seed=1))
    assert int(record["products"]) == 0
    loss.backward()
    assert int(record["products"]) == 3 if mode == "neumann" else int(record["products"]) > 0


def test_record_is_what_the_solve_did() -> None:
    config = configuration(solver={"tolerance": 1e-2, "method": "picard"}, attractor={"gate_maximum": 0.5})
    model, tokens = build(config), random_tokens(4, 8)
    _, record = model(tokens, tokens)
    f, start = map_and_start(model, tokens)
    solution = solve(f, start, replace(config.solver, compaction=False))
    assert float(record["solver_iterations"]) == pytest.approx(float(solution.iterations.double().mean()))
    assert float(record["solver_residual"]) == pytest.approx(float(solution.residual.max()), rel=1e-3)
    assert float(record["solver_converged"]) == float(solution.converged.double().mean())
    assert float(record["solver_evaluations"]) == pytest.approx(float(record["solver_iterations"]))  # compaction


@pytest.mark.parametrize("kind", ["transformer", "attractor"])
def test_depths_are_evaluated_from_one_proposal(kind: str) -> None:
    config = configuration(model={"kind": kind}, solver={"tolerance": 1e-3})
    model, tokens, targets = build(config), random_tokens(2, 8), masked_targets()
    loss, record = model(tokens, targets, depths=[0, 1, 4, "auto", "strict"])
    assert not loss.requires_grad
    asked: list[int | str] = [0] if kind == "transformer" else [0, 1, 4, "auto", "strict"]
    for depth in asked:
        logits = model.logits(tokens, depth=depth)
        want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(targets)
        torch.testing.assert_close(record[f"nll/{depth}"], want, rtol=1e-5, atol=1e-6)
        if depth != 0:
            assert record[f"iterations/{depth}"].shape == record[f"converged/{depth}"].shape == (2,)
            if isinstance(depth, int):
                assert record[f"iterations/{depth}"].tolist() == [depth] * 2
            distance = record[f"proposal_distance/{depth}"]
            assert distance.shape == (2,)
            assert (distance > 0).all()
    assert {key for key in record if key.startswith("nll/")} == {f"nll/{depth}" for depth in asked}
    torch.testing.assert_close(loss, record[f"nll/{asked[-1]}"].sum() / (targets != IGNORE).sum())


def test_proposal_distance_is_its_definition(trained: LanguageModel) -> None:
    tokens, targets = text_batch(3, 64, seed=-1)
    _, record = trained(tokens, targets, depths=[6])
    f, start = map_and_start(trained, tokens)
    state = solve(f, start, replace(trained.config.solver, min_iterations=6, max_iterations=6)).state
    want = torch.tensor([float((a - b).norm() / b.norm()) for a, b in zip(state, start, strict=True)])
    torch.testing.assert_close(record["proposal_distance/6"], want, rtol=1e-5, atol=0)


def test_iterations_lower_the_loss_of_a_trained_model(trained: LanguageModel) -> None:
    tokens, targets = text_batch(32, 64, seed=-1)
    _, record = trained(tokens, targets, depths=[0, 1, "auto"])
    proposal, one, solved = (float(record[f"nll/{depth}"].mean()) for depth in (0, 1, "auto"))
    assert solved < proposal, "what was trained is the equilibrium, so it must predict better than the proposal"
    assert solved < one + 0.05
    assert bool(record["converged/auto"].all())


def test_training_and_evaluation_see_the_same_equilibrium(trained: LanguageModel) -> None:
    # in training the output is one application past the solve: the losses differ by no more than the tolerance moves them
    model, (tokens, targets) = deepcopy(trained).requires_grad_(), text_batch(8, 64, seed=-1)
    loss, _ = model(tokens, targets)
    with torch.no_grad():
        evaluated, _ = model(tokens, targets)
        asked, _ = model(tokens, targets, depths=["auto"])
    assert float(evaluated) == pytest.approx(float(asked), rel=1e-6)
    assert float(loss) == pytest.approx(float(asked), rel=1e-3)  # tolerance 3e-4 of the state, logits a few times that


# ---- precision


def test_bf16_weights_are_solved_with_an_fp32_state(trained: LanguageModel, record_property: Any) -> None:
    model = deepcopy(trained).to(torch.bfloat16)
    assert model.refine is not None
    tokens, targets = text_batch(16, 64, seed=-1)
    proposal, context = model.propose(tokens, None)
    assert proposal.dtype == torch.bfloat16
    with torch.no_grad():
        refined = model.refine(proposal, context)
    solution = refined.solution
    assert solution is not None
    assert refined.output.dtype == solution.state.dtype == solution.residual.dtype == torch.float32
    record_property("residual", float(solution.residual.max()))
    # Blocks that compute in bf16 bottom out below 1e-3 on this map, above the tolerance of 3e-4: the solve must notice and stop
    assert float(solution.residual.max()) < 1.2e-3
    assert int(solution.iterations.max()) < 25
    loss, _ = model(tokens, targets, depths=["auto"])
    reference, _ = trained(tokens, targets, depths=["auto"])
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(reference), rel=1e-2)


def test_an_fp32_map_in_a_bf16_model_reaches_the_tolerance(trained: LanguageModel) -> None:
    # the floor above is the blocks' rounding and nothing of the solver's
    model = deepcopy(trained).to(torch.bfloat16)
    assert model.refine is not None
    model.refine.float()
    proposal, context = model.propose(text_batch(16, 64, seed=-1)[0], None)
    with torch.no_grad():
        solution = model.refine(proposal, context).solution
    assert solution is not None
    assert bool(solution.converged.all())
    assert float(solution.residual.max()) < 3e-4


def test_a_bf16_state_stalls_higher(trained: LanguageModel) -> None:
    # what the fp32 state is for, on the same map: rounded after every evaluation, plain iteration stops getting closer sooner
    f, start = map_and_start(deepcopy(trained).to(torch.bfloat16), text_batch(16, 64, seed=-1)[0])
    floor = {}
    for name, function in {"fp32": f, "bf16": lambda y: f(y.bfloat16().float()).bfloat16()}.items():
        floor[name] = solve(function, start, SolverConfig(method="picard", min_iterations=20, max_iterations=20)).residual
    assert (floor["fp32"] < 0.8 * floor["bf16"]).all()


@pytest.mark.parametrize("mode", ["one_step", "neumann", "phantom", "adjoint"])
def test_bf16_training_gives_finite_gradients_in_bf16(mode: str) -> None:
    model = build(configuration(gradient={"mode": mode, "tolerance": 1e-2}, solver={"tolerance": 1e-2}), dtype=torch.bfloat16)
    loss, _ = model(random_tokens(2, 8), random_tokens(2, 8, seed=1))
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name


# ---- solvers on trained maps


def test_per_token_anderson_needs_no_more_evaluations_than_plain_iteration(trained: LanguageModel, record_property: Any) -> None:
    maps = held_out_maps(trained)
    print("\nevaluations of the worst of 16 sequences, mean over 4 batches, at " + ", ".join(map(str, TOLERANCES)))
    needed: dict[str, list[float]] = {}
    for name, solver in SOLVERS.items():
        efforts = [effort(maps, replace(solver, tolerance=tolerance)) for tolerance in TOLERANCES]
        assert all(one.converged == 1 for one in efforts), name
        needed[name] = [one.evaluations for one in efforts]
        record_property(name, needed[name])
        print(f"  {name:20} {needed[name]}   milliseconds {[round(1e3 * one.seconds, 1) for one in efforts]}")
    for plain, token, sequence in zip(needed["plain"], needed["token, history 2"], needed["sequence, history 4"], strict=True):
        assert token <= plain
        assert token <= sequence + 1  # causal mixing costs at most one evaluation against the published, leaking one
    assert sum(needed["token, history 2"]) < sum(needed["plain"])


def test_the_equilibrium_does_not_depend_on_the_solver(trained: LanguageModel) -> None:
    model = deepcopy(trained).double()
    f, start = map_and_start(model, text_batch(4, 64, seed=-9)[0])
    states = [solve(f, start, replace(solver, tolerance=1e-9, max_iterations=200)).state for solver in SOLVERS.values()]
    assert all(relative(state, states[0]) < 1e-7 for state in states)  # tolerance / (1 - L), with L below 0.95
