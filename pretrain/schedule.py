"""Learning rate and weight decay as pure functions of tokens, so that a resumed or re-batched run follows the same curve.

With x = tokens_done / total_tokens in [0, 1], where tokens_done counts the tokens before the step:

    trapezoid   1, after an optional linear warm-up, then linear from 1 to `final` over the last `decay` of the tokens
    cosine      final + (1 - final) * (1 + cos(pi t)) / 2, with t running from 0 to 1 after the warm-up
    constant    1 after the warm-up

The published recipe is a trapezoid with no warm-up, decay 0.5 and final 0 (arXiv 2605.12466's code, after nanochat).
A warm-up rises from 0, so a run that has one spends its first step at a rate of 0.
Refuses: a token count below 0 or a budget below 1, with a ValueError.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.sections import ScheduleSection


def progress(tokens_done: int, total_tokens: int) -> float:
    """Share of the token budget that is used, in [0, 1]; a run that overshoots its budget stays at 1."""
    if tokens_done < 0 or total_tokens < 1:
        raise ValueError(f"A schedule needs tokens_done >= 0 and total_tokens >= 1, not {tokens_done} and {total_tokens}.")
    return min(1.0, tokens_done / total_tokens)


def learning_rate_scale(tokens_done: int, schedule: ScheduleSection, total_tokens: int) -> float:
    """The factor in [0, 1] on every group's own learning rate, for the step that starts at `tokens_done`."""
    x = progress(tokens_done, total_tokens)
    if x < schedule.warmup:
        return x / schedule.warmup
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "cosine":
        t = (x - schedule.warmup) / (1 - schedule.warmup) if schedule.warmup < 1 else 1.0
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * t)) / 2
    left = min(1.0, (1 - x) / schedule.decay) if schedule.decay > 0 else 1.0
    return schedule.final + (1 - schedule.final) * left


def weight_decay_scale(tokens_done: int, total_tokens: int) -> float:
    """The factor on Muon's weight decay: linear from 1 to 0 over the whole run (the published recipe)."""
    return 1.0 - progress(tokens_done, total_tokens)
