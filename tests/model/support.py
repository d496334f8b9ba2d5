"""What the tests of the mathematics share: tiny models in float64, real text, and a short training run.

Nothing here is under test, and nothing here calls the code under test to say what is right: references live in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from model.attention import Context, make_context
from model.config import AttractorConfig, BackboneConfig, GradientConfig, ModelConfig, SolverConfig
from model.language_model import LanguageModel, build
from model.layers import ChannelGate
from model.refine import Refine

BYTES = 256  # vocabulary of the tests that read text


def configuration(**sections: dict[str, Any]) -> ModelConfig:
    """A tiny Attractor Model; keyword arguments replace fields of the sections model, attractor, solver and gradient."""
    base = ModelConfig(
        model=BackboneConfig(vocabulary_size=64, width=16, heads=2, backbone_layers=1),
        attractor=AttractorConfig(gate_initial=0.4, gate_maximum=0.75),
        solver=SolverConfig(tolerance=1e-6, max_iterations=64),
        gradient=GradientConfig(),
    )
    return replace(base, **{name: replace(getattr(base, name), **fields) for name, fields in sections.items()})


def random_tokens(batch: int, length: int, vocabulary: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_context(config: ModelConfig, batch: int, length: int, documents: Tensor | None = None) -> Context:
    return make_context(config.model, torch.zeros(batch, length, dtype=torch.int64), documents)


def double_refine(config: ModelConfig, seed: int = 0) -> Refine:
    """The attractor and its solve in float64, with the model's own initial weights and gates that differ by channel."""
    model = build(config, dtype=torch.float64, seed=seed)
    assert model.refine is not None
    with torch.no_grad():
        for gate in model.refine.attractor.modules():
            if isinstance(gate, ChannelGate):
                gate.raw.add_(torch.randn(gate.raw.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), alpha=0.3)
    return model.refine


@lru_cache(maxsize=1)
def text() -> Tensor:
    """The language reference that every Python carries, as bytes [n] int64: about 450 kB of English."""
    joined = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def text_batch(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, length] at random places of the first nine tenths of the text (seed < 0: of the last tenth)."""
    data, generator = text(), torch.Generator().manual_seed(abs(seed))
    cut = len(data) * 9 // 10
    low, high = (0, cut - length - 1) if seed >= 0 else (cut, len(data) - length - 1)
    starts = torch.randint(low, high, (batch,), generator=generator)
    windows = torch.stack([data[start : start + length + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def text_configuration() -> ModelConfig:
    return ModelConfig(
        model=BackboneConfig(vocabulary_size=BYTES, width=64, heads=4, backbone_layers=2),
        attractor=AttractorConfig(),
        solver=SolverConfig(),
        gradient=GradientConfig(),
    )


def train(model: LanguageModel, first: int, last: int, *, batch: int = 8, length: int = 64, rate: float = 3e-3) -> list[float]:
    """Steps first..last of a plain AdamW run on the text; returns the losses. A step's batch depends on its number alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.8, 0.95), weight_decay=0.0)
    losses = []
    for step in range(first, last):
        tokens, targets = text_batch(batch, length, seed=step)
        loss, _ = model(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def map_and_start(model: LanguageModel, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The map y -> f(y, y0) of a batch, and y0, in fp32 or more."""
    assert model.refine is not None
    attractor = model.refine.attractor
    with torch.no_grad():
        proposal, context = model.propose(tokens, None)
        proposal = proposal.to(torch.promote_types(proposal.dtype, torch.float32))
    return lambda y: attractor(y, proposal, context), proposal


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.detach() - want.detach()).norm() / want.detach().norm())
