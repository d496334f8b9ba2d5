"""The Attractor reasoner against definitions: equilibria, phantom-k, the Jacobian penalty, counts of iterations; and the random variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import SolverConfig
from model.fixed_point import solve
from model.reasoning.reasoner import Reasoner, Thought
from model.reasoning.thinking import Latents
from tests.model.reasoning.support import CELLS, grids, lively, reasoning

ROWS = 3
INPUTS, IDENTIFIERS = grids(ROWS), torch.zeros(ROWS, dtype=torch.int64)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
EXACT = {"min_iterations": 1, "max_iterations": 200, "tolerance": 1e-13, "patience": 200}
SMALL = {"width": 8, "mlp_width": 8, "prefix": 1, "layers": 1}


def contractive(model: Reasoner) -> Reasoner:
    """The same with smaller output matrices and a louder puzzle, so that its map has one equilibrium: with a prefix of 1,
    since a prefix position that no puzzle embedding fills sees x = 0, and y and z there only lean on each other."""
    with torch.no_grad():
        model.embedding.weight *= 4
        for name, parameter in model.core.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter *= 0.3
    return model


def net(model: Reasoner, state: Tensor, injection: Tensor) -> Tensor:
    return model.core.network(state, injection, model._tables(injection))  # type: ignore[union-attr]


def think(model: Reasoner, latents: Latents, iterations: int | None = None) -> Thought:
    return model(latents, INPUTS, IDENTIFIERS, iterations)


def test_a_cycle_ends_at_the_equilibrium_of_z_and_one_update_of_y() -> None:
    model = contractive(lively(reasoning(kind="attractor", prefix=1, outer_cycles=2, solver=EXACT)))
    latents = model.start(ROWS)
    with torch.no_grad():
        x = model._embed(INPUTS, IDENTIFIERS)
        y, z = latents
        for _ in range(2):
            for _ in range(80):
                z = net(model, z, y + x)
            y = net(model, y, z)
        thought = think(model, latents)
    torch.testing.assert_close(thought.latents, (y, z), rtol=1e-7, atol=1e-7)
    assert float(thought.record["solver_converged"]) == 1
    assert float(thought.record["solver_residual"]) < 1e-13


@pytest.mark.parametrize(
    ("mode", "steps", "damping"), [("one_step", 1, 1.0), ("phantom", 1, 1.0), ("phantom", 3, 1.0), ("phantom", 2, 0.6)]
)
def test_the_gradient_is_that_of_k_applications_from_the_solution(mode: str, steps: int, damping: float) -> None:
    gradient = {"mode": mode, "steps": steps, "damping": damping}
    config = reasoning(kind="attractor", outer_cycles=1, gradient=gradient)
    model, (y, z) = lively(config), lively(config).start(ROWS)
    with torch.no_grad():
        x = model._embed(INPUTS, IDENTIFIERS)
        star = solve(lambda state: net(model, state, y + x), z, config.solver).state
    x, state = model._embed(INPUTS, IDENTIFIERS), star
    for _ in range(steps):
        state = (1 - damping) * state + damping * net(model, state, y + x)
    answer = net(model, y, state)
    loss = (answer @ model.head.weight.T)[:, 2:].square().sum() + (answer[:, 0] @ model.halting.weight[0]).sum()
    thought = think(model, (y, z))
    got = thought.logits.square().sum() + (thought.q_halt - model.halting.bias[0]).sum()
    torch.testing.assert_close(got, loss)
    assert thought.latents[1].allclose(state, **CLOSE)
    for a, b in zip(*(torch.autograd.grad(value, list(model.core.parameters())) for value in (got, loss)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_jacobian_penalty_estimates_the_dense_jacobian() -> None:
    config = reasoning(kind="attractor", outer_cycles=1, gradient={"jacobian_penalty": 2.0}, solver=EXACT, **SMALL)
    model, one = contractive(lively(config)), grids(1)
    latents = model.start(1)
    with torch.no_grad():
        x = model._embed(one, IDENTIFIERS[:1])
        star = solve(lambda state: net(model, state, latents[0] + x), latents[1], config.solver).state
    jacobian = torch.autograd.functional.jacobian(lambda state: net(model, state, latents[0] + x), star)
    want = 2.0 * float(jacobian.square().sum()) / star.numel()
    torch.manual_seed(0)
    draws = [float(model(latents, one, IDENTIFIERS[:1]).penalty.detach()) for _ in range(60)]
    # a draw's relative deviation is at most sqrt(2 / rank), rank about 100 here: 60 draws leave 2 %, and 8 % is four of it
    assert sum(draws) / len(draws) == pytest.approx(want, rel=0.08)


def test_a_whole_cycle_is_the_map_of_yz() -> None:
    model = contractive(lively(reasoning(kind="attractor", prefix=1, solve="yz", inner_cycles=2, solver=EXACT)))
    with torch.no_grad():
        thought = think(model, model.start(ROWS))
        (y, z), x = thought.latents, model._embed(INPUTS, IDENTIFIERS)
        after = net(model, net(model, z, y + x), y + x)
        torch.testing.assert_close((net(model, y, after), after), (y, z), **CLOSE)
        other = think(model, tuple(latent + 0.3 for latent in model.start(ROWS)))
    torch.testing.assert_close(other.latents, (y, z), rtol=1e-7, atol=1e-7)  # wherever it starts
    assert float(think(model, model.start(ROWS)).record["applications"]) == 2 * 3


def test_yz_differentiates_k_cycles() -> None:
    config = reasoning(kind="attractor", solve="yz", inner_cycles=2)
    model = lively(config)
    x, latents = model._embed(INPUTS, IDENTIFIERS), model.start(ROWS)

    def cycle(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = net(model, net(model, z, y + x), y + x)
        return net(model, y, z), z

    def stacked(state: Tensor) -> Tensor:
        return torch.cat(cycle(*state.chunk(2, 1)), 1)

    y, _ = cycle(*cycle(*solve(stacked, torch.cat(latents, 1), config.solver).state.chunk(2, 1)))
    loss, got = (y @ model.head.weight.T)[:, 2:].square().sum(), think(model, latents).logits.square().sum()
    torch.testing.assert_close(got, loss)
    for a, b in zip(*(torch.autograd.grad(value, list(model.core.parameters())) for value in (got, loss)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["trm", "attractor", "yz", "hrm"])
def test_iterations_set_the_inner_work_of_an_evaluation(kind: str) -> None:
    options = {"kind": "attractor", "solve": "yz", "inner_cycles": 2} if kind == "yz" else {"kind": kind, "inner_cycles": 3}
    model = lively(reasoning(outer_cycles=2, **options))
    latents = model.start(ROWS)
    x = model._embed(INPUTS, IDENTIFIERS).detach()
    low, high = (getattr(model.core, name, None) or model.core.network for name in ("low", "high"))  # type: ignore[union-attr]
    tables = model._tables(x)
    with torch.no_grad():
        none = think(model, latents, 0)
        once = think(model, latents, 1)
        y, z = latents
        if kind == "yz":
            assert all(a.equal(b) for a, b in zip(none.latents, latents, strict=True))
            z = net(model, net(model, z, y + x), y + x)
            y = net(model, y, z)
        else:
            a = b = y
            w = z
            for _ in range(2):
                a = high(a, z, tables)
                w = low(w, b + x, tables)
                b = high(b, w, tables)
            torch.testing.assert_close(none.latents, (a, z), **CLOSE)
            y, z = b, w
        torch.testing.assert_close(once.latents, (y, z), **CLOSE)
        configured = think(model, latents)
        if kind in ("trm", "hrm"):
            assert think(model, latents, 3).logits.equal(configured.logits)
    assert float(once.record["solver_evaluations"]) == (3 if kind == "yz" else 4)
    assert float(none.record["solver_evaluations"]) == (0 if kind == "yz" else 2)
    with pytest.raises(ValueError, match="iterations=1"):
        think(model, latents, 1)


def test_a_solve_may_begin_at_zero() -> None:
    config = reasoning(kind="attractor", outer_cycles=1, solver={"start": "zero"})
    model = lively(config)
    y, z = model.start(ROWS)
    with torch.no_grad():
        got = [think(model, (y, start)).latents for start in (z, z + 1)]
        assert all(a.equal(b) for a, b in zip(*got, strict=True))


def test_compaction_changes_no_result() -> None:
    solver = {"min_iterations": 1, "max_iterations": 40, "tolerance": 1e-4, "compaction": True}
    for solve_for in ("z", "yz"):
        config = reasoning(kind="attractor", solve=solve_for, inner_cycles=1, solver=solver)
        model = contractive(lively(config))
        y, z = model.start(ROWS)
        z = z * torch.tensor([1.0, 3.0, 0.1], dtype=z.dtype)[:, None, None]
        whole = lively(replace(config, solver=replace(config.solver, compaction=False)))
        whole.load_state_dict(model.state_dict())
        with torch.no_grad():
            a, b = think(model, (y, z)), think(whole, (y, z))
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
        assert float(a.record["solver_evaluations"]) <= float(b.record["solver_evaluations"])


@pytest.mark.parametrize("kind", ["trm", "attractor"])
def test_a_random_start_is_new_for_every_row_and_draw(kind: str) -> None:
    model = lively(reasoning(kind=kind, start="random", start_std=0.5))
    generator = torch.Generator().manual_seed(0)
    drawn = [model.start(64, generator) for _ in range(2)]
    flat = torch.stack([latent.flatten(1) for latents in drawn for latent in latents]).flatten(0, 1)
    assert flat.unique(dim=0).shape[0] == 256
    assert float(flat.std()) == pytest.approx(0.5, rel=0.01)
    again = model.start(64, torch.Generator().manual_seed(0))
    assert all(a.equal(b) for a, b in zip(again, drawn[0], strict=True))


@pytest.mark.parametrize("kind", ["trm", "attractor"])
def test_noise_is_on_the_path_in_training_alone(kind: str) -> None:
    noise = 0.01
    quiet = contractive(lively(reasoning(kind=kind, inner_cycles=2, step_size=0.9)))
    noisy = contractive(lively(reasoning(kind=kind, inner_cycles=2, step_size=0.9, path_noise=noise)))
    latents = quiet.start(ROWS)
    with torch.no_grad():
        assert think(noisy, latents).logits.equal(think(quiet, latents).logits)
    first, second = think(noisy, latents), think(noisy, latents)
    assert not first.logits.equal(second.logits)
    torch.manual_seed(3)
    again = think(noisy, latents).logits
    torch.manual_seed(3)
    assert think(noisy, latents).logits.equal(again)
    # the last update of y adds noise of this size to what it makes; what came before it adds some more
    size = float((first.latents[0] - think(quiet, latents).latents[0]).std())
    assert noise < size * 1.05
    assert size < 10 * noise


def test_noise_is_held_in_the_solve_too() -> None:
    noise, solver = 0.01, {**EXACT, "max_iterations": 60}
    ends = []
    for size in (0.0, noise):
        model = contractive(lively(reasoning(kind="attractor", prefix=1, outer_cycles=1, path_noise=size, solver=solver)))
        y, z = model.start(ROWS)
        end = think(model, (y, z)).latents[1]
        with torch.no_grad():
            ends.append(end - net(model, end, y + model._embed(INPUTS, IDENTIFIERS)))
    quiet, held = ends  # what z exceeds the map's value by, at its end: the noise that was held
    assert float(quiet.abs().max()) < 1e-9
    assert float(held.std()) == pytest.approx(noise, rel=0.1)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_k_applications_follow_the_solve_in_every_cycle(damping: float) -> None:
    config = reasoning(kind="attractor", outer_cycles=2, gradient={"mode": "phantom", "steps": 2, "damping": damping})
    model = lively(config)
    (y, z), x = model.start(ROWS), model._embed(INPUTS, IDENTIFIERS).detach()
    with torch.no_grad():
        for _ in range(2):
            z = solve(lambda state, injection=y + x: net(model, state, injection), z, config.solver).state
            for _ in range(2):
                z = torch.lerp(z, net(model, z, y + x), damping)
            y = net(model, y, z)
        torch.testing.assert_close(think(model, model.start(ROWS)).latents, (y, z), **CLOSE)
    torch.testing.assert_close(think(model, model.start(ROWS)).latents, (y, z), **CLOSE)  # in training likewise


def test_a_noisy_map_still_converges() -> None:
    # noise is held during a solve: fresh noise at each evaluation would keep the residual near its own size
    solver = {"min_iterations": 1, "max_iterations": 60, "tolerance": 1e-6, "patience": 60}
    model = contractive(lively(reasoning(kind="attractor", prefix=1, path_noise=0.01, solver=solver)))
    assert float(think(model, model.start(ROWS)).record["solver_converged"]) == 1


def test_partial_steps_leave_the_equilibrium_where_it_is() -> None:
    whole, partial = (contractive(lively(reasoning(kind="attractor", prefix=1, step_size=size, solver=EXACT))) for size in (1.0, 0.7))
    with torch.no_grad():
        a, b = (model.core.network for model in (whole, partial))  # type: ignore[union-attr]
        x, (y, z) = whole._embed(INPUTS, IDENTIFIERS), whole.start(ROWS)
        config, tables = SolverConfig(**EXACT), whole._tables(x)  # type: ignore[arg-type]
        ends = [solve(lambda state, f=f: f(state, y + x, tables), z, config).state for f in (a, b)]
    torch.testing.assert_close(*ends, **CLOSE)
    assert ends[0].shape == (ROWS, CELLS + 1, 32)
