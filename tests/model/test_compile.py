"""torch.compile of the backbone and the map, the solver's loop outside: the same losses and gradients as eager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.language_model import LanguageModel, build
from tests.model.support import configuration, random_tokens


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: LanguageModel, batch: int = 3) -> list[torch.Tensor]:
    model.zero_grad()
    loss, record = model(random_tokens(batch, 16), random_tokens(batch, 16, seed=1))
    loss.backward()
    return [loss.detach(), record["solver_residual"], *(p.grad for p in model.parameters() if p.grad is not None)]


def check(model: LanguageModel, eager: LanguageModel, batch: int = 3) -> None:
    got, want = gradients(model, batch), gradients(eager, batch)
    assert len(got) == len(want) == 2 + len(list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        # fp32, fused and reordered sums, a few evaluations deep
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("mode", ["one_step", "neumann", "adjoint", "phantom"])
def test_traced_maps_equal_eager(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # tracing, autograd and the buffers it would reuse, without the minutes a code generator takes
    config = configuration(
        gradient={"mode": mode, "steps": 2, "max_iterations": 5, "tolerance": 1e-9}, solver={"min_iterations": 3, "max_iterations": 3}
    )
    model, eager = build(config), build(config)
    compiled: list[dict[str, object]] = []
    original = torch.compile

    def traced(function, **options):  # type: ignore[no-untyped-def]
        compiled.append(options)
        return original(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", traced)
    model.compile_maps()
    assert len(compiled) == 2, "the backbone and the map, nothing else"
    check(model, eager)
    for _ in range(2):  # accumulation, and another batch size, as compaction makes them
        check(model, eager, batch=2)


@pytest.mark.slow
def test_compiled_maps_equal_eager() -> None:
    # the one test that generates code: most of a minute with a cold cache. neumann goes through the compiled graph twice
    config = configuration(solver={"min_iterations": 3, "max_iterations": 3}, gradient={"mode": "neumann"})
    model, eager = build(config), build(config)
    model.compile_maps()
    check(model, eager)
