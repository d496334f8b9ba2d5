"""Runs on each of four ranks for test_invariants.py: tables of parameters with one fault each, and what the check says to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.agreement import rank
from pretrain.errors import RunStopped
from pretrain.invariants import check
from pretrain.layout import Layout
from pretrain.mesh import Mesh

DATA = Layout(pipeline=1, data=4, tensor=1)
DATA_TENSOR = Layout(pipeline=1, data=2, tensor=2)
PIPE_TENSOR = Layout(pipeline=2, data=1, tensor=2)
SHAPES = {"embedding.weight": (8, 6), "stage0.norm.gain": (6,), "stage1.norm.gain": (6,), "stage1.mlp.weight": (8, 6)}
Named = dict[str, Tensor]


class Case(NamedTuple):
    """A fault that `spoil` puts into the parameters or facts of one rank."""

    layout: Layout
    rank: int = 0
    spoil: Callable[[Named, dict[str, int]], None] = lambda named, facts: None


def parameters(mesh: Mesh, dtype: torch.dtype = torch.float32) -> Named:
    """A small model as this rank has it: sharded matrices, replicated norms, the tied embedding on first and last stage; what other
    stages hold is on the meta device."""
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    pipe, last = mesh.where.pipe, mesh.layout.pipeline - 1
    held = {name for name in whole if last == 0 or name == "embedding.weight" or name.startswith(f"stage{pipe}")}
    named = {}
    for name in held & {"embedding.weight", "stage1.mlp.weight"}:
        named[name] = whole[name].chunk(mesh.layout.tensor)[mesh.where.tensor].clone()
        if mesh.layout.tensor > 1:
            named[name].tensor_model_parallel = True  # type: ignore[attr-defined]
    named |= {name: whole[name].clone() for name in held if name.endswith("gain")}
    return {name: named[name] if name in held else whole[name].to("meta") for name in whole}


def flip_last_bit(tensor: Tensor) -> None:
    """Of the last value."""
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).flatten()
    bits[-1] ^= 1


def swap(tensor: Tensor) -> None:
    """The first two values change places."""
    flat = tensor.flatten()
    flat[:2] = flat[:2].flip(0)


def swap_signs(tensor: Tensor) -> None:
    """One value becomes negative, another positive: the plain sum of the bits stays as it was."""
    flat = tensor.flatten()
    up, down = int(flat.argmax()), int(flat.argmin())
    flat[up], flat[down] = -flat[up], -flat[down]


def spoiling(name: str, how: Callable[[Tensor], Any]) -> Callable[[Named, dict[str, int]], None]:
    return lambda named, facts: how(named[name])


def set_fact(value: int) -> Callable[[Named, dict[str, int]], None]:
    return lambda named, facts: facts.update(solver_iterations=value)


CASES = {
    **{f"whole {layout.describe()}": Case(layout) for layout in (DATA, DATA_TENSOR, PIPE_TENSOR)},
    "one bit on a data replica": Case(DATA, 2, spoiling("stage1.mlp.weight", flip_last_bit)),
    "values swapped": Case(DATA, 1, spoiling("stage0.norm.gain", swap)),
    "signs swapped": Case(DATA, 3, spoiling("stage0.norm.gain", swap_signs)),
    "one bit on a shard's replica": Case(DATA_TENSOR, 3, spoiling("stage1.mlp.weight", flip_last_bit)),
    "one bit on a tensor replica": Case(PIPE_TENSOR, 1, spoiling("stage0.norm.gain", flip_last_bit)),
    "one bit in the tied copy": Case(PIPE_TENSOR, 2, spoiling("embedding.weight", flip_last_bit)),
    "not a number": Case(PIPE_TENSOR, 3, spoiling("stage1.norm.gain", lambda tensor: tensor[2:3].fill_(float("nan")))),
    "infinite": Case(PIPE_TENSOR, 0, spoiling("embedding.weight", lambda tensor: tensor[0, :1].fill_(float("-inf")))),
    "iterations of tensor ranks": Case(DATA_TENSOR, 2, set_fact(9)),
    "iterations of stages": Case(Layout(pipeline=4), 3, set_fact(9)),
}


def said(name: str, dtype: torch.dtype) -> str | None:
    """What the check says to a case, and None where it finds nothing. Iterations differ by data rank, as they may."""
    case = CASES[name]
    mesh = Mesh(case.layout, rank())
    named, facts = parameters(mesh, dtype), {"solver_iterations": 5 + mesh.where.data}
    if rank() == case.rank:
        case.spoil(named, facts)
    try:
        check(named.items(), mesh, facts)
    except RunStopped as stopped:
        return f"{stopped} (code {stopped.code})"
    return None


def all_cases() -> dict[str, Any]:
    """By case, what this rank was told, in fp32 and in bf16; and under a ZeRO 3 engine."""
    return {name: [said(name, torch.float32), said(name, torch.bfloat16)] for name in CASES} | zero_three()


def zero_three() -> dict[str, list[str | None]]:
    """A model that DeepSpeed has cut into four shares, the last of each shorter than the others: whole, and with one value spoilt."""
    from pretrain.config import TrainSection
    from pretrain.runtime import process_group

    with process_group(TrainSection(tokens=1, device="cpu")):
        import deepspeed

        model = nn.Linear(5, 3)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        deepspeed.initialize(model=model, config=config, dist_init_required=False)
        assert model.weight.ds_tensor.numel() == 4, "15 values in four shares"
        if rank() == 3:
            model.weight.ds_tensor[3] = float("nan")  # padding
        whole = zero_check(model)
        if rank() == 3:
            model.weight.ds_tensor[2] = float("nan")
        return {"zero 3 whole": [whole], "zero 3 spoilt": [zero_check(model)]}


def zero_check(model: nn.Module) -> str | None:
    try:
        check(model.named_parameters(), Mesh(DATA, rank()), {})
    except RunStopped as stopped:
        return f"{stopped} (code {stopped.code})"
    return None
