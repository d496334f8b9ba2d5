"""`attractor bench generate`: tokens a second of generation with a cache and without, at no iterations and to the tolerance, and of the
Transformer that the backbone alone is.

For their ratio, the Transformer and the model at 0 iterations take turns token by token, each first in every other turn, so that whatever
else the machine does meets both alike; it is that of the median tokens. For its tokens a second a case runs alone, its weights in what
caches the processor has. Without a cache, a token costs the whole text before it: that is measured at every `_STRIDE`-th token of the text
just made, each standing for its neighbours, and the token it would choose is held against the one chosen with the cache (`agreed`).

The model is first trained for a few steps on real text (pretrain/bench.py), so that its map contracts as a trained one's does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from model.cache import Cache
from model.config import ModelConfig
from model.generation import Sampling, Step, generate
from model.language_model import LanguageModel, build
from model.refine import Depth
from model.roles import parameter_roles
from pretrain.bench import DEFAULT_VOCABULARY, text_batches
from pretrain.config import Recipe
from pretrain.optimizer import build_optimizer
from pretrain.runtime import device_of

Row = dict[str, Any]
_STRIDE = 32
_TRAINED_ON = 64  # tokens a sequence of the warm-up


def bench_generate(recipe: Recipe, tokens: int, prompt: int = 16, warm_up: int = 40) -> list[Row]:
    """A row for each case: the Transformer with as many blocks as the recipe's backbone, the model at 0 iterations, and as it solves."""
    device = device_of(recipe.train.device)
    vocabulary = recipe.model.vocabulary_size or DEFAULT_VOCABULARY
    config = replace(recipe.architecture, model=replace(recipe.model, vocabulary_size=vocabulary))
    plain = replace(config, model=replace(config.model, kind="transformer"))
    text = next(text_batches(1, prompt, vocabulary, device))[0][0].tolist()
    cases = [_Case("transformer", _trained(plain, recipe, device, 0), 0, text)]
    if config.model.solves or config.model.loops:
        model = _trained(config, recipe, device, warm_up)
        cases += [_Case(f"{config.model.kind}, {depth}", model, depth, text) for depth in (0, "auto")]
    _take_turns(cases, _STRIDE)  # wakes kernels and allocator
    medians = _take_turns(cases[:2], tokens)
    for case in cases:
        _take_turns([case], tokens)
        for length in range(_STRIDE // 2, tokens, _STRIDE):
            case.again(length)
    beside = [1.0, *(medians[0] / other for other in medians[1:]), None]
    return [{**case.row(tokens), "over_transformer": ratio} for case, ratio in zip(cases, beside, strict=False)]


def _take_turns(cases: list[_Case], tokens: int) -> list[float]:
    """Seconds of the median token of each."""
    for case in cases:
        case.begin(tokens)
    for turn in range(tokens):
        for case in cases if turn % 2 else reversed(cases):
            case.step()
    return [median(case.seconds) for case in cases]


def _trained(config: ModelConfig, recipe: Recipe, device: torch.device, steps: int) -> LanguageModel:
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = build(config, device=device, dtype=dtype, seed=recipe.train.seed)
    optimizer = build_optimizer(model, parameter_roles(model), recipe.optimizer, fused=device.type == "cuda")
    optimizer.guard_gradients(recipe.optimizer.clip)
    batches = text_batches(recipe.train.micro_batch, _TRAINED_ON, config.model.vocabulary_size or 0, device)
    for _ in range(steps):
        loss, _ = model(*next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@dataclass
class _Case:
    """One way to generate, and what it took so far."""

    name: str
    model: LanguageModel
    depth: Depth
    prompt: list[int]
    made: list[int] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)

    def begin(self, tokens: int) -> None:
        self.made, self.iterations, self.seconds = [], [], []
        self.steps: Iterator[Step] = generate(self.model, [self.prompt], tokens, Sampling(0), self.depth)

    def step(self) -> None:
        """One more token, with the cache; the device is waited for, because the token is read."""
        start = time.perf_counter()
        step = next(self.steps)
        self.seconds.append(time.perf_counter() - start)
        self.made += step.tokens
        self.iterations += step.iterations

    def again(self, length: int) -> None:
        """The token after so many new ones, from all those before it."""
        before = torch.tensor([self.prompt + self.made[:length]], device=self.model.unembedding.device)
        start = time.perf_counter()
        token = int(self.model.extend(before, Cache(1, before.shape[1]), self.depth).logits.argmax())
        self.whole_seconds.append(time.perf_counter() - start)
        self.agreed.append(token == self.made[length])

    def row(self, tokens: int) -> Row:
        rate = tokens / sum(self.seconds)
        without = len(self.whole_seconds) / sum(self.whole_seconds)
        return {
            "case": self.name,
            "tokens": tokens,
            "tokens_per_second": rate,
            "uncached_tokens_per_second": without,
            "cached_over_uncached": rate / without,
            "iterations_per_token": sum(self.iterations[1:]) / len(self.iterations[1:]) if self.iterations[1:] else 0.0,
            "agreed": sum(self.agreed) / len(self.agreed),
        }
