"""Each way in which ranks can stop training one model, on four real ranks: the check finds it, and names the tensor and the ranks."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from pretrain.invariants import Table, due, fingerprint, violations
from tests.distributed.ranks import run_ranks

HERE = socket.gethostname()
FAULTS = {
    "one bit on a data replica": f"stage1.mlp.weight has other bits on rank 2 on {HERE} than on ranks 0-1, 3 on {HERE}.",
    "values swapped": f"stage0.norm.gain has other bits on rank 1 on {HERE} than on ranks 0, 2-3 on {HERE}.",
    "signs swapped": f"stage0.norm.gain has other bits on rank 3 on {HERE} than on ranks 0-2 on {HERE}.",
    "one bit on a shard's replica": "stage1.mlp.weight (shard of tensor rank 1) has other bits "
    f"on rank 3 on {HERE} than on rank 1 on {HERE}.",
    "one bit on a tensor replica": f"stage0.norm.gain has other bits on rank 1 on {HERE} than on rank 0 on {HERE}.",
    "one bit in the tied copy": f"embedding.weight (shard of tensor rank 0) has other bits on rank 2 on {HERE} than on rank 0 on {HERE}.",
    "not a number": f"stage1.norm.gain is not finite on rank 3 on {HERE} but is on rank 2 on {HERE}.",
    "infinite": f"embedding.weight (shard of tensor rank 0) is not finite on rank 0 on {HERE} but is on rank 2 on {HERE}.",
    "iterations of tensor ranks": f"solver_iterations is 6 on rank 3 on {HERE} and 9 on rank 2 on {HERE}, which must agree.",
    "zero 3 spoilt": f"weight (ZeRO share of data rank 3) is not finite on rank 3 on {HERE}.",
}


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.invariants_ranks:all_cases", 4)


def test_whole_layouts_pass(told: list[dict[str, Any]]) -> None:
    passed = [name for name, said in told[0].items() if said in ([None], [None, None])]
    assert passed == [
        "whole pipeline 1 x data 4 x tensor 1",
        "whole pipeline 1 x data 2 x tensor 2",
        "whole pipeline 2 x data 1 x tensor 2",
        "iterations of stages",
        "zero 3 whole",
    ]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_by_tensor_and_rank_to_every_rank(told: list[dict[str, Any]], name: str) -> None:
    for said in [text for rank in told for text in rank[name]]:
        assert said.startswith(f"The ranks no longer train one model: {FAULTS[name]} ")
        assert "--resume" in said
        assert said.endswith("(code 6)")


def test_the_minority_is_named_against_the_majority_and_hosts_with_it() -> None:
    key = ("embedding.weight", None, None)
    values = [1, 1, 2, 1, 3, 1]
    tables = [Table(f"node-{rank // 2}", {key: (value, value, True)}, {}) for rank, value in enumerate(values)]
    assert violations(tables) == [
        "embedding.weight has other bits on rank 2 on node-1 and others on rank 4 on node-2 "
        "than on ranks 0-1, 3, 5 on node-0, node-1, node-2"
    ]


def test_a_value_that_is_finite_nowhere_is_told() -> None:
    tables = [Table("a", {("gate", None, None): (5, 5, False)}, {}) for _ in range(2)]
    assert violations(tables) == ["gate is not finite on ranks 0-1 on a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_fingerprints_are_the_sums_modulo_2_to_the_64(dtype: torch.dtype) -> None:
    values = (torch.randn(70_000, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)  # more than one chunk
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[values.element_size()]
    bits = values.view(integers).tolist()
    expected = [sum(bits), sum(place * bit for place, bit in enumerate(bits, 1))]
    plain, weighted, finite = fingerprint(values.reshape(700, 100)).tolist()
    assert [(found - true) % 2**64 for found, true in zip((plain, weighted), expected, strict=True)] == [0, 0]
    assert finite == 1


def test_a_tensor_that_is_not_contiguous_counts_in_its_own_order() -> None:
    matrix = torch.randn(5, 7)
    assert fingerprint(matrix.T).tolist() == fingerprint(matrix.T.contiguous()).tolist()
    assert fingerprint(matrix.T).tolist() != fingerprint(matrix).tolist()


def test_the_first_steps_of_a_process_and_then_every_so_many() -> None:
    assert [step for step in range(1, 31) if due(step, 10)] == [1, 2, 3, 10, 20, 30]
    assert [step for step in range(15, 31) if due(step, 10, first=14)] == [15, 16, 17, 20, 30]
    assert not any(due(step, 0) for step in range(1, 31))
