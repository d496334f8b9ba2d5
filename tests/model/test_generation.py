"""What is drawn, against the definitions; and the loop, against one that computes everything again for every token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.generation import Sampling, Step, choose, generate, probabilities
from model.language_model import LanguageModel, build
from tests.model.support import configuration, random_tokens, text_batch
from tests.model.test_cache import made

# ---- sampling

ROW = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.2]).log()[None]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, [0.4, 0.05, 0.25, 0.1, 0.2]),
        ({"temperature": 0.5}, [0.16, 0.0025, 0.0625, 0.01, 0.04]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 3}, [0.4, 0, 0.25, 0, 0.2]),
        ({"top_k": 9}, [0.4, 0.05, 0.25, 0.1, 0.2]),
        ({"top_p": 0.39}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.41}, [0.4, 0, 0.25, 0, 0]),
        ({"top_p": 0.64}, [0.4, 0, 0.25, 0, 0]),
        ({"top_p": 0.66}, [0.4, 0, 0.25, 0, 0.2]),
        ({"top_p": 1.0}, [0.4, 0.05, 0.25, 0.1, 0.2]),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        # of the top 3, renormalised: 0.47, 0.29, 0.24
        ({"top_k": 3, "top_p": 0.77}, [0.4, 0, 0.25, 0, 0.2]),
        ({"top_k": 3, "top_p": 0.75}, [0.4, 0, 0.25, 0, 0]),
        # temperature comes first: 0.58, 0.23, 0.15 and less
        ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0, 0]),
    ],
)
def test_probabilities_are_those_of_the_definition(fields: dict[str, Any], want: list[float]) -> None:
    wanted = torch.tensor([want], dtype=torch.float64) / sum(want)
    torch.testing.assert_close(probabilities(ROW, Sampling(**fields)), wanted, rtol=1e-5, atol=1e-7)
    permuted = torch.tensor([3, 0, 4, 1, 2])  # every row by itself, wherever its tokens stand
    both = probabilities(torch.cat((ROW[:, permuted], ROW)), Sampling(**fields))
    torch.testing.assert_close(both, torch.cat((wanted[:, permuted], wanted)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1e-8, 1e-40, 1e-320])
def test_a_temperature_near_zero_leaves_the_most_probable_tokens(temperature: float) -> None:
    logits, draws = torch.tensor([[-50.0, 80.0, 80.0, 60.0]]), [torch.Generator().manual_seed(0)]
    for top_p in (None, 0.4):
        sampling = Sampling(temperature, top_p=top_p)
        found = probabilities(logits, sampling)
        assert found.sum() == 1
        assert bool((found[:, [0, 3]] == 0).all())
        assert int(choose(logits, sampling, draws)) in (1, 2)


def test_tokens_that_tie_for_the_last_place_all_stay() -> None:
    assert (probabilities(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), Sampling(top_k=2)) > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("fields", [{}, {"top_k": 3, "temperature": 1.5}, {"top_p": 0.66}])
def test_draws_follow_the_probabilities(fields: dict[str, Any]) -> None:
    sampling, count = Sampling(**fields), 20_000
    draw = torch.Generator().manual_seed(0)
    logits = ROW.expand(count, -1)
    counts = torch.bincount(choose(logits, sampling, [draw] * count), minlength=5)
    want = probabilities(ROW, sampling)[0]
    assert bool((counts[want == 0] == 0).all())
    spread = (want * (1 - want) / count).sqrt().clamp_min(1e-9)
    assert float(((counts / count - want).abs() / spread).max()) < 4


def test_the_greatest_number_drawn_meets_a_token_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.ones(1, dtype=torch.float64))
    logits = torch.cat((torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.full((10,), float("-inf"))))
    assert choose(logits[None], Sampling(), [torch.Generator()]).tolist() == [49]


@pytest.mark.parametrize(
    "fields", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_what_is_no_sampling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="number"):
        Sampling(**fields)


# ---- the loop


def naive(model: LanguageModel, prompt: list[int], count: int, depth: int | str) -> list[int]:
    """The most probable tokens, each from a computation of the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor([tokens]), depth=depth)[0, -1].argmax()))
    return tokens[len(prompt) :]


def texts(steps: Iterator[Step], rows: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        assert len(step.rows) == len(step.tokens)
        for row, token in zip(step.rows, step.tokens, strict=True):
            made[row].append(token)
    return made


PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("name", ["transformer", "additive", "deq", "parcae", "looped"])
@pytest.mark.parametrize("depth", ["auto", 2])
def test_greedy_text_is_that_of_computing_everything_again(name: str, depth: int | str) -> None:
    model = made(name)
    got = texts(generate(model, PROMPTS, 8, Sampling(0), depth), 3)
    assert got == [naive(model, prompt, 8, "strict" if depth == "auto" else depth) for prompt in PROMPTS]


def test_a_trained_model_in_fp32(trained: LanguageModel) -> None:
    prompts = [row.tolist() for row in text_batch(2, 24, seed=-1)[0]]
    assert texts(generate(trained, prompts, 24, Sampling(0)), 2) == [naive(trained, prompt, 24, "strict") for prompt in prompts]


def test_a_seed_gives_a_row_the_same_text_whatever_is_beside_it(trained: LanguageModel) -> None:
    prompts = [row.tolist()[: 8 + 4 * i] for i, row in enumerate(text_batch(3, 24, seed=-2)[0])]
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=7)
    together = texts(generate(trained, prompts, 16, sampling), 3)
    assert together == texts(generate(trained, prompts, 16, sampling), 3)
    assert together[0] == texts(generate(trained, prompts[:1], 16, sampling), 1)[0]
    assert together != texts(generate(trained, prompts, 16, Sampling(0.9, 50, 0.95, seed=8)), 3)
    twice = texts(generate(trained, prompts[:1] * 2, 16, sampling), 2)
    assert twice[0] != twice[1], "rows share no draws"


@pytest.mark.parametrize("depth", ["auto", 2])
def test_a_row_ends_before_the_end_token_and_the_others_go_on(depth: int | str) -> None:
    model = made("additive")
    free = texts(generate(model, PROMPTS, 10, Sampling(0), depth), 3)
    end = next(token for token in free[0][2:] if any(token not in other[:9] for other in free[1:]))
    got = texts(generate(model, PROMPTS, 10, Sampling(0), depth, end), 3)
    for row, text in enumerate(free):
        assert got[row] == (text[: text.index(end)] if end in text else text)
    assert len(got[0]) < 10


def test_iterations_are_told_by_row_and_nothing_is_computed_after_the_last_token() -> None:
    model = made("additive")
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    steps = list(generate(model, PROMPTS, 4, Sampling(0)))
    assert len(steps) == len(calls) == 4
    assert all(len(step.iterations) == 3 and min(step.iterations) > 1 for step in steps)
    assert [step.iterations for step in generate(model, PROMPTS, 2, Sampling(0), depth=5)] == [[5] * 3] * 2
    assert [step.iterations for step in generate(made("transformer"), PROMPTS, 2, Sampling(0))] == [[], []]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(5.0, seed=3)])
def test_rows_that_pad_the_vocabulary_are_never_chosen(sampling: Sampling) -> None:
    model = build(configuration(), seed=0)
    (free,) = texts(generate(model, [[1]], 40, sampling, 0), 1)
    vocabulary = max(free) // 2
    (bounded,) = texts(generate(model, [[1]], 40, sampling, 0, vocabulary=vocabulary), 1)
    assert max(bounded) < vocabulary <= max(free)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1)])
def test_logits_that_are_not_finite_are_refused(sampling: Sampling, bad: float) -> None:
    model = build(configuration(), seed=0)
    with torch.no_grad():
        model.norm.weight.fill_(bad)
    with pytest.raises(FloatingPointError, match="not finite"):
        list(generate(model, [[1], [2, 3]], 4, sampling))


def test_longer_than_anything_trained() -> None:
    model = build(configuration(), seed=0)
    assert [len(text) for text in texts(generate(model, [random_tokens(1, 30)[0].tolist()], 600, Sampling(0), 0), 1)] == [600]


def test_gradients_elsewhere_are_left_alone() -> None:
    # the loop hands out between steps: what its caller does meanwhile must not be under inference mode
    model = build(configuration(), seed=0)
    weight = torch.ones(2, requires_grad=True)
    total: Tensor = torch.zeros(())
    for _ in generate(model, [[1]], 2, Sampling(0)):
        total = total + (weight * 3).sum()
    total.backward()
    assert weight.grad is not None
    loss, _ = model(random_tokens(1, 8), random_tokens(1, 8))
    loss.backward()
