"""Generation with a cache against the whole computation without one: every kind of model, every depth, in float64 and fp32.

`LanguageModel.logits` computes all positions at once and knows no cache: it is the reference throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.cache import Cache
from model.language_model import LanguageModel, build
from model.noise import normal
from tests.model.support import configuration, random_tokens
from tests.model.test_causality import perturb

LENGTH = 12
LOOP = {"core": 1, "coda": 1, "iterations": 3}
RICH = {"backbone_layers": 3, "value_embeddings": True, "value_gate_channels": 8, "kv_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"model": {"kind": "transformer", "mlp": "swiglu"}},
    "additive": {"model": {}, "attractor": {"layers": 2}},
    "concat": {"model": {}, "attractor": {"injection": "concat"}},
    "init_only": {"model": {}, "attractor": {"injection": "init_only"}},
    "cross_attention": {"model": {}, "attractor": {"injection": "cross_attention"}},
    "zero": {"model": {}, "solver": {"start": "zero"}},
    "noise": {"model": {}, "solver": {"start": "noise"}},
    "sequence_mixing": {"model": {}, "solver": {"mixing": "sequence", "stop": "max_token"}},
    "deq": {"model": {"kind": "deq"}},
    "parcae": {"model": {"kind": "parcae"}, "loop": LOOP},
    "looped": {"model": {"kind": "looped"}, "loop": LOOP},
}
SOLVED = ["additive", "concat", "cross_attention", "zero", "noise", "sequence_mixing", "deq"]  # init_only's map does not contract
TOLERANCE = 1e-9


def made(name: str, dtype: torch.dtype = torch.float64, tolerance: float = TOLERANCE) -> LanguageModel:
    fields = {section: dict(of) for section, of in MODELS[name].items()}
    fields["model"] = {**RICH, **fields["model"]}
    fields["solver"] = {"tolerance": tolerance, "max_iterations": 200, "patience": 20, **fields.get("solver", {})}
    model = build(configuration(**fields), seed=1)
    perturb(model)
    return model.to(dtype).eval()


def states(model: LanguageModel, tokens: Tensor, cache: Cache, depth: int | str, lengths: Sequence[int] | None = None) -> Tensor:
    """Like `extend`, in the model's own precision: the normed last states."""
    kept: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model.extend(tokens, cache, depth, lengths)
    hook.remove()
    return kept[0].clone()


def whole(model: LanguageModel, tokens: Tensor, depth: int | str) -> Tensor:
    """The normed states of all positions, from one computation without a cache."""
    kept: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model.logits(tokens, depth=depth)
    hook.remove()
    return kept[0]


def in_chunks(model: LanguageModel, tokens: Tensor, depth: int | str, cuts: Sequence[int]) -> list[Tensor]:
    """The last state after each chunk of tokens [b, s] that ends at a cut."""
    cache = Cache(len(tokens), tokens.shape[1])
    return [states(model, tokens[:, start:stop], cache, depth) for start, stop in zip((0, *cuts), cuts, strict=False)]


CHUNKS = [(12,), (5, 6, 7, 8, 9, 10, 11, 12), (1, 2, 6, 7, 12)]


@pytest.mark.parametrize("cuts", CHUNKS, ids=["at-once", "prompt-then-one-by-one", "chunks"])
@pytest.mark.parametrize("name", SOLVED)
def test_the_cached_equilibrium_is_the_whole_ones(name: str, cuts: tuple[int, ...]) -> None:
    model, tokens = made(name), random_tokens(2, LENGTH)
    want = whole(model, tokens, "strict")
    assert bool(model.extend(tokens, Cache(2, LENGTH)).solution.converged.all())  # type: ignore[union-attr]
    for stop, got in zip(cuts, in_chunks(model, tokens, "auto", cuts), strict=True):
        torch.testing.assert_close(got, want[:, stop - 1], rtol=0, atol=20 * TOLERANCE)


@pytest.mark.parametrize("name", ["additive", "deq"])
def test_the_error_shrinks_with_the_tolerance(name: str) -> None:
    tokens = random_tokens(2, LENGTH)
    want = whole(made(name, tolerance=1e-12), tokens, "strict")[:, -1]
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        got = in_chunks(made(name, tolerance=tolerance), tokens, "auto", range(1, LENGTH + 1))[-1]
        errors.append(float((got - want).norm() / want.norm()))
        assert errors[-1] < 5 * tolerance
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("cuts", CHUNKS[1:], ids=["prompt-then-one-by-one", "chunks"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sequence_mixing"])
def test_a_fixed_number_of_iterations_is_the_same_number(name: str, depth: int, cuts: tuple[int, ...]) -> None:
    model, tokens = made(name), random_tokens(2, LENGTH)
    want = whole(model, tokens, depth)
    for stop, got in zip(cuts, in_chunks(model, tokens, depth, cuts), strict=True):
        torch.testing.assert_close(got, want[:, stop - 1], rtol=1e-11, atol=1e-12)


def test_a_fixed_number_mixes_by_token_whatever_is_configured() -> None:
    # over sequences, gamma would be that of the tokens of one call, and a token's state would depend on how it came in
    tokens = random_tokens(2, LENGTH)
    model = made("sequence_mixing")
    by_token = made("sequence_mixing")
    by_token.refine.solver = replace(by_token.refine.solver, mixing="token")  # type: ignore[union-attr]
    want = whole(by_token, tokens, 4)
    for cuts in CHUNKS:
        for stop, got in zip(cuts, in_chunks(model, tokens, 4, cuts), strict=True):
            torch.testing.assert_close(got, want[:, stop - 1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["additive", "sequence_mixing", "deq"])
def test_a_solver_of_a_fixed_count_is_a_fixed_count_in_strict_too(name: str) -> None:
    # no tolerance ends it: keys of one slot would be those of the last iteration, far from those of the others
    model, tokens = made(name), random_tokens(2, LENGTH)
    solver = replace(model.refine.solver, min_iterations=3, max_iterations=3)  # type: ignore[union-attr]
    model.refine.solver = solver  # type: ignore[union-attr]
    want = whole(model, tokens, "strict")
    for cuts in CHUNKS:
        for stop, got in zip(cuts, in_chunks(model, tokens, "auto", cuts), strict=True):
            torch.testing.assert_close(got, want[:, stop - 1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["additive", "deq", "parcae"])
def test_lower_precisions(name: str, dtype: torch.dtype, close: float) -> None:
    # bf16 stalls far above the tolerance: patience ends the solve, on both sides
    model, tokens = made(name, dtype, tolerance=1e-6), random_tokens(2, LENGTH)
    if model.config.model.solves:
        model.refine.solver = replace(model.refine.solver, patience=3)  # type: ignore[union-attr]
    want = whole(model, tokens, "strict").float()
    for stop, got in zip(CHUNKS[1], in_chunks(model, tokens, "auto", CHUNKS[1]), strict=True):
        assert float((got.float() - want[:, stop - 1]).norm() / want[:, stop - 1].norm()) < close


@pytest.mark.parametrize("depth", ["auto", 3])
@pytest.mark.parametrize("name", ["transformer", "additive", "noise", "deq", "parcae", "looped"])
def test_rows_of_different_lengths_are_what_each_is_alone(name: str, depth: int | str) -> None:
    model = made(name, tolerance=1e-6)
    lengths, room = [3, 9, 6], 5
    tokens = random_tokens(3, 9 + room)
    together, alone = Cache(3, 9 + room), [Cache(1, 9 + room) for _ in lengths]
    padded = torch.stack([row[:9].masked_fill(torch.arange(9) >= length, 0) for row, length in zip(tokens, lengths, strict=True)])
    pairs = [(padded, lengths, [tokens[row : row + 1, :length] for row, length in enumerate(lengths)])]
    for step in range(room - 2):  # one token a row
        pairs.append((tokens[:, 9 + step : 10 + step], [1] * 3, [tokens[row : row + 1, 9 + step : 10 + step] for row in range(3)]))
    pairs.append((tokens[:, -2:], [2, 1, 2], [tokens[row : row + 1, -2:][:, :n] for row, n in enumerate([2, 1, 2])]))
    for batch, new, singles in pairs:
        got = states(model, batch, together, depth, new)
        for row, single in enumerate(singles):
            torch.testing.assert_close(got[row : row + 1], states(model, single, alone[row], depth), rtol=1e-9, atol=1e-10)
    assert together.lengths == [cache.lengths[0] for cache in alone]


def test_padding_delays_no_row() -> None:
    model, tokens, lengths = made("additive", tolerance=1e-6), random_tokens(3, 9), [1, 9, 5]
    alone = [model.extend(tokens[row : row + 1, :length], Cache(1, 9)).solution for row, length in enumerate(lengths)]
    together = model.extend(tokens, Cache(3, 9), lengths=lengths).solution
    assert together is not None
    assert together.iterations.tolist() == [int(one.iterations) for one in alone if one is not None]
    assert int(together.iterations[0]) < int(together.iterations[1]), "all rows converge at once: nothing could be delayed"


@pytest.mark.parametrize("depth", ["auto", 2])
def test_rows_that_leave_change_nothing_for_the_others(depth: int | str) -> None:
    model, tokens = made("additive", tolerance=1e-6), random_tokens(3, LENGTH)
    all_rows, some = Cache(3, LENGTH), Cache(3, LENGTH)
    for cache in (all_rows, some):
        model.extend(tokens[:, :6], cache, depth, [6, 4, 5])
        model.extend(tokens[:, 6:7], cache, depth)
    some.select([2, 0])
    for at in (7, 8):
        want, got = states(model, tokens[:, at : at + 1], all_rows, depth), states(model, tokens[[2, 0], at : at + 1], some, depth)
        torch.testing.assert_close(got, want[[2, 0]], rtol=1e-9, atol=1e-10)
    assert some.lengths == [8, 9]


def test_no_iterations_call_the_map_never_and_hold_nothing_for_it() -> None:
    model = made("additive")
    assert isinstance(model.refine, nn.Module)
    calls: list[int] = []
    model.refine.attractor.register_forward_hook(lambda *_: calls.append(1))
    cache = Cache(1, LENGTH)
    extended = model.extend(random_tokens(1, 4), cache, 0)
    assert extended.solution is None
    assert calls == []
    assert len(cache._kept) == len(model.backbone.blocks)
    model.extend(random_tokens(1, 1), Cache(1, LENGTH), 3)
    assert calls == [1, 1, 1]


def test_a_step_computes_its_own_tokens_alone() -> None:
    # what caching is for: no matrix sees an earlier token again
    model, seen = made("additive"), set[int]()
    cache = Cache(2, LENGTH)
    model.extend(random_tokens(2, 8), cache)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(inputs[0].shape[1]))
    model.extend(random_tokens(2, 1), cache)
    assert seen == {1}


def test_what_does_not_fit_is_refused() -> None:
    model = made("transformer")
    cache = Cache(2, 6)
    model.extend(random_tokens(2, 4), cache, lengths=[4, 2])
    with pytest.raises(ValueError, match="capacity of 6"):
        model.extend(random_tokens(2, 3), cache)
    for tokens, lengths in (
        (random_tokens(3, 1), None),
        (random_tokens(2, 2), [2]),
        (random_tokens(2, 2), [3, 1]),
        (random_tokens(2, 2), [0, 1]),
    ):
        with pytest.raises(ValueError, match="The cache holds 2 rows"):
            model.extend(tokens, cache, lengths=lengths)
    assert cache.lengths == [4, 2]
    model.extend(random_tokens(2, 2), cache)  # and what does is taken


def test_noise_of_a_position_depends_on_no_length() -> None:
    like = torch.zeros((), dtype=torch.float32)
    long = normal([3, 5], 700, 16, 0.1, like)
    for length in (1, 7, 255, 256, 257, 512):
        assert torch.equal(normal([3, 5], length, 16, 0.1, like), long[:, :length])
    assert float(long.std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(long[:, :256], long[:, 256:512])
