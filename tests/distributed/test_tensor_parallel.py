"""The tensor-parallel model on 2 and 4 ranks against the whole one in float64, its solve under forced skew, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)  # real ranks, and a machine may be slow
BATCH, LENGTH, WIDTH, BLOCKS, EVALUATIONS = 3, 16, 32, 2, 4
CASES: list[dict[str, Any]] = [
    {"gradient": {"mode": "one_step"}},
    {"gradient": {"mode": "one_step"}, "divided": True, "recompute": True},
    {"gradient": {"mode": "adjoint", "max_iterations": 60}},
    {"gradient": {"mode": "adjoint", "max_iterations": 60}, "divided": True, "attractor": {"injection": "cross_attention"}},
    {"gradient": {"mode": "neumann", "steps": 3, "clip": 0.3}, "attractor": {"injection": "concat"}},
    {
        "gradient": {"mode": "phantom", "steps": 3, "damping": 0.7},
        "attractor": {"injection": "init_only"},
        "solver": {"max_iterations": 5},  # this map does not contract, so rounding would grow
    },
    {"gradient": {"mode": "one_step", "convergence_penalty": 0.5}, "solver": {"tolerance": 1e-3}},
    {"solver": {"mixing": "sequence", "history": 4}},
    {"solver": {"stop": "max_token", "method": "picard"}, "model": {"mlp": "swiglu", "tied_embeddings": False}},
    {"model": {"kind": "transformer", "value_embeddings": True}},
    {"model": {"kind": "transformer", "value_embeddings": True}, "divided": True},
]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.tensor_parallel_ranks:checks", request.param, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_loss_gradients_and_evaluations_are_the_whole_models(results: list[dict[str, Any]], index: int) -> None:
    """float64: 1e-16 an operation; a solve to 1e-12 leaves that in its state, and an adjoint solve in its gradient."""
    for rank in results:
        errors = rank["against_whole"][index]
        assert errors["loss"] < 1e-10
        assert errors["gradient"] < 1e-8
        assert errors["evaluated"] < 1e-8


def test_ranks_whose_residuals_differ_stop_together(results: list[dict[str, Any]]) -> None:
    for kind in range(3):
        assert all(rank["skewed"][kind] == results[0]["skewed"][kind] for rank in results)
    noise, nan, late = results[0]["skewed"]
    assert max(nan) < 25, "a sequence that is no longer finite stops by patience"
    assert noise != late, "the disturbance reached every rank's count"


def test_a_solve_sends_two_all_reduces_a_block_and_iteration_and_its_history_is_divided(results: list[dict[str, Any]]) -> None:
    """An all-reduce's bytes, as a gather on the way in and a scatter on the way out; the residual adds 2 numbers a sequence."""
    ranks, activations = len(results), BATCH * LENGTH * WIDTH
    for rank in results:
        sent = [tuple(entry) for entry in rank["sent"]["sent"]]
        assert sent.count(("gather", activations)) == 2 * BLOCKS * EVALUATIONS
        assert sent.count(("scatter", activations // ranks)) == 2 * BLOCKS * EVALUATIONS
        assert sent.count(("reduce", 2 * BATCH)) == EVALUATIONS + 1, "the distance from the proposal, once"
        rest = [entry for entry in sent if entry not in {("gather", activations), ("scatter", activations // ranks), ("reduce", 2 * BATCH)}]
        assert rest == [("reduce", 1)], "the count of fallbacks, once a solve"
        assert {tuple(shape) for shape in rank["sent"]["kept"]} == {(BATCH, LENGTH // ranks, WIDTH)}


def test_cross_entropy_over_vocabulary_shards_is_megatrons(results: list[dict[str, Any]]) -> None:
    """fp32 against fp32: sums of 64 logits in another order."""
    for rank in results:
        assert max(rank["cross_entropy"].values()) < 1e-5
