"""Chunked cross-entropy with its gradients computed on the way forward, against torch's own on the whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import loss
from model.loss import IGNORE, cross_entropy_sum, cross_entropy_tokens
from tests.model.support import relative

TOKENS, WIDTH, VOCABULARY = 23, 8, 37


def problem(dtype: torch.dtype = torch.float64, seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(TOKENS, generator=generator) < ignored, IGNORE)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=IGNORE, reduction=reduction)


def set_chunk(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", tokens * VOCABULARY)


@pytest.mark.parametrize("chunk", [0, 1, 2, 7, 22, 23, 1000])  # 0: a vocabulary larger than the budget, one token at a time
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_value_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch, chunk: int, ignored: float) -> None:
    set_chunk(monkeypatch, chunk)
    hidden, weight, targets = problem(ignored=ignored)
    got, want = cross_entropy_sum(hidden, weight, targets), reference(hidden, weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)  # float64 sums in another order
    for a, b in zip(torch.autograd.grad(0.37 * got, (hidden, weight)), torch.autograd.grad(0.37 * want, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@settings(deadline=None, max_examples=20)
@given(chunk=st.integers(1, 30), seed=st.integers(0, 1000))
def test_any_chunk_gives_the_same_losses(chunk: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_chunk(monkeypatch, chunk)
        hidden, weight, targets = problem(seed=seed)
        want = reference(hidden, weight, targets, "none")
        torch.testing.assert_close(cross_entropy_tokens(hidden, weight, targets), want, rtol=1e-13, atol=1e-13)


def test_ignored_tokens_have_no_loss_and_no_gradient() -> None:
    hidden, weight, targets = problem()
    ignored = targets == IGNORE
    assert 0 < int(ignored.sum()) < TOKENS
    cross_entropy_sum(hidden, weight, targets).backward()
    assert hidden.grad is not None
    assert (hidden.grad[ignored] == 0).all()
    assert (hidden.grad[~ignored] != 0).any(dim=-1).all()
    assert (cross_entropy_tokens(hidden, weight, targets)[ignored] == 0).all()


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = problem()
    (gradient,) = torch.autograd.grad(cross_entropy_sum(hidden, weight.detach(), targets), hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(hidden, weight, targets), hidden)[0])
    assert not cross_entropy_sum(hidden.detach(), weight.detach(), targets).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(hidden, weight, targets), reference(hidden, weight, targets))


@pytest.mark.parametrize("chunk", [5, 23])
def test_bf16_errs_no_more_than_its_rounding(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    set_chunk(monkeypatch, chunk)
    hidden, weight, targets = problem(torch.bfloat16)
    got = cross_entropy_sum(hidden, weight, targets)
    assert got.dtype == torch.float32
    want = reference(hidden, weight, targets)
    # logits leave the product in bf16 (2^-9 relative, of values up to 10); 16 tokens average what each rounds
    assert float(got) == pytest.approx(float(want), rel=2e-3)
    wanted = torch.autograd.grad(want, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a.double(), b.double()) < 1e-2  # a few roundings of 2^-9 one after another


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(torch.float32)
    got = cross_entropy_sum(hidden * 1e3, weight * 1e2, targets)
    assert got.isfinite()
    torch.testing.assert_close(got.double(), reference(hidden * 1e3, weight * 1e2, targets), rtol=1e-6, atol=0)
    assert torch.autograd.grad(got, hidden)[0].isfinite().all()


def test_logits_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    # every intermediate of the forward pass stays below a chunk's logits
    set_chunk(monkeypatch, 4)
    hidden, weight, targets = problem()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        cross_entropy_sum(hidden, weight, targets).backward()
    assert largest <= max(4 * VOCABULARY, VOCABULARY * WIDTH)
    assert largest < TOKENS * VOCABULARY
