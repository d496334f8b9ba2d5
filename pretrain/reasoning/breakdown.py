"""Where a reasoner is right: by difficulty, by what its halting head says, and by random start. Arithmetic on Traces alone.

    difficulty    the ratings of the puzzles evaluated, cut into (at most) five parts that each hold about a fifth of the puzzles; puzzles
                  of one rating stay together, so there may be fewer and they may be uneven
    halting       what would be if every puzzle were left at the first step at which the halting head says stop, the last step where it
                  never does; against all steps for all puzzles
    breadth       K random starts a puzzle. After s steps the answer of the start whose latents moved least in step s is taken (EqR, arXiv
                  2605.21488: depth x breadth), beside the mean over the starts and the share of puzzles that any start has right

Shapes: n puzzles, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.reasoning.evaluate import standard_error
from pretrain.reasoning.traces import Traces

PARTS = 5


def parts_of(ratings: Tensor, parts: int = PARTS) -> Tensor:
    """[n] int64: the part of each puzzle, from 0, the easiest; a rating is in the part in which the middle of its puzzles lies."""
    if not len(ratings):
        return torch.empty(0, dtype=torch.int64)
    _, place, counts = ratings.unique(return_inverse=True, return_counts=True)
    middle = (counts.cumsum(0) - counts / 2) / counts.sum()
    return (middle * parts).long().clamp_max(parts - 1)[place]


def by_difficulty(traces: Traces, ratings: Tensor, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Of each part that has puzzles: ratings from least to largest, and what the whole set has too."""
    part = parts_of(ratings)
    halting = traces.halting_steps().double()
    found = []
    for number in part.unique().tolist():
        rows = part == number
        count = int(rows.sum())
        exact = {str(step): float(traces.exact[rows, step - 1].double().mean()) for step in steps}
        found.append(
            {
                "least": int(ratings[rows].min()),
                "largest": int(ratings[rows].max()),
                "puzzles": count,
                "exact": exact,
                "exact_error": {step: standard_error(share, count) for step, share in exact.items()},
                "halting_steps": float(halting[rows].mean()),
            }
        )
    return found


def halting_report(traces: Traces) -> dict[str, Any]:
    """What the halting head is worth, over the S steps taken. Shares are of all puzzles."""
    at = traces.halting_steps() - 1
    stopped = traces.stop.any(dim=1)
    right = traces.exact.gather(1, at[:, None])[:, 0]
    exact = _share(right)
    told = {
        "right": _share(stopped & right),
        "wrong": _share(stopped & ~right),
        "never_right": _share(~stopped & right),
        "never_wrong": _share(~stopped & ~right),
    }
    steps = float((at + 1).double().mean())
    return {
        "bound": traces.steps,
        "steps": steps,
        "saved": 1 - steps / traces.steps,
        "exact": exact,
        "exact_error": standard_error(exact, traces.puzzles),
        "exact_all_steps": _share(traces.exact[:, -1]),
        "stopped": told,
        "judged_right": {str(step): _share(traces.stop[:, step - 1] == traces.exact[:, step - 1]) for step in _powers(traces.steps)},
    }


def _share(rows: Tensor) -> float:
    return float(rows.double().mean())


def _powers(last: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return sorted({*(1 << power for power in range(last.bit_length())), last})


def chosen(traces: Sequence[Traces]) -> Tensor:
    """[n, S] int64: of several starts, the one with the smallest residual after each step; a residual that is not finite is never chosen
    before one that is.
    """
    residuals = torch.stack([trace.residual for trace in traces])
    return residuals.nan_to_num(nan=float("inf")).argmin(dim=0)


def by_breadth(traces: Sequence[Traces], breadths: Sequence[int], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Of each breadth, the first so many of `traces`: by step the share exact of the chosen answers, of the mean start and of the best."""
    found = []
    for breadth in breadths:
        several = traces[:breadth]
        exact = torch.stack([trace.exact for trace in several])
        taken = exact.gather(0, chosen(several)[None])[0]
        report: dict[str, Any] = {"breadth": breadth, "chosen": {}, "chosen_error": {}, "mean": {}, "any": {}}
        for step in steps:
            share = _share(taken[:, step - 1])
            report["chosen"][str(step)] = share
            report["chosen_error"][str(step)] = standard_error(share, traces[0].puzzles)
            report["mean"][str(step)] = _share(exact[:, :, step - 1])
            report["any"][str(step)] = _share(exact[:, :, step - 1].any(dim=0))
        found.append(report)
    return found
