"""Log-likelihoods of continuations, many at a time, from a model in eval mode: what lm-eval's tasks are scored by. Knows no lm-eval.

    log p(continuation | context) = sum_i log softmax(norm(y_i) W^T)[token_(i+1)]        over the positions before the continuation's tokens

The solve is strict unless a count is asked for: a token is done by its own residual and those before it (model/strict.py), so a score
depends neither on what stands after it (padding on the right) nor on its neighbours in the batch, up to the rounding of matrix products.
Logits are computed for the continuation's positions alone, some rows at a time; [b, s, v] is never held. Requests that read the same
tokens, such as answers of one token to one question, share a forward: a causal model computes the same for them.

Shapes: tokens [b, s]; hidden [n, w], n positions that predict something; weight [v, w].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.refine import Depth, Refine

_LOGITS_AT_ONCE = 1 << 25
"""Elements: 128 MiB in fp32."""
_TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 16}
"""Of a batch whose size is not given, padding included. A batch for which the device has no room is halved."""


class Row(NamedTuple):
    """Inputs and what they are to predict: targets[-1] follows the last of them, targets[-2] is that last one, and so on."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Score(NamedTuple):
    logprob: float
    """Natural logarithm, the sum over the targets."""
    greedy: bool
    """Whether each target is the most likely token."""


class Scorer:
    """Of one model, which from then on mixes per token, at one depth. `batch`: rows at a time; None fits them to the device."""

    def __init__(self, model: LanguageModel, device: torch.device, depth: Depth = "strict", batch: int | None = None) -> None:
        self.model, self.device, self.depth, self.batch = model, device, depth, batch
        if isinstance(model.refine, Refine):  # over sequences, padding and later tokens would enter a fixed count
            model.refine.solver = replace(model.refine.solver, mixing="token")

    @torch.no_grad()
    def scores(self, rows: Sequence[Row], told: Callable[[int], object] = lambda _: None) -> list[Score]:
        """The score of each row; `told` hears how many more are done."""
        found: list[Score] = [Score(0.0, True)] * len(rows)
        readers: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            readers.setdefault(row.inputs, []).append(number)
        waiting = deque(self._batches(sorted(readers, key=lambda inputs: (-len(inputs), inputs))))
        while waiting:
            inputs = waiting.popleft()
            numbers = [readers[ids] for ids in inputs]
            try:
                scored = self._score(inputs, [[rows[number].targets for number in group] for group in numbers])
            except torch.OutOfMemoryError:
                if len(inputs) == 1:
                    raise
                half = len(inputs) // 2
                waiting.extendleft((inputs[half:], inputs[:half]))
                continue
            for number, score in zip((number for group in numbers for number in group), scored, strict=True):
                found[number] = score
            told(len(scored))
        return found

    def _batches(self, inputs: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Inputs of like length together, the longest first: what does not fit shows at once."""
        start = 0
        while start < len(inputs):
            size = max(1, _TOKENS_AT_ONCE[self.device.type] // len(inputs[start])) if self.batch is None else self.batch
            yield inputs[start : start + size]
            start += size

    def _score(self, inputs: Sequence[tuple[int, ...]], targets: Sequence[Sequence[tuple[int, ...]]]) -> list[Score]:
        """Scores of all readers of all inputs, in that order."""
        longest = [max(map(len, group)) for group in targets]
        hidden = self._hidden(inputs, longest)
        positions: list[int] = []  # of each target: the row of `hidden` that predicts it
        wanted: list[int] = []
        reader: list[int] = []
        end = count = 0
        for group, most in zip(targets, longest, strict=True):
            end += most
            for continuation in group:
                positions += range(end - len(continuation), end)
                wanted += continuation
                reader += [count] * len(continuation)
                count += 1
        index = torch.tensor([positions, wanted, reader], device=self.device)
        logprobs, greedy = token_scores(hidden, self.model.unembedding, index[0], index[1])
        sums = torch.zeros(count, dtype=torch.float64, device=self.device).index_add_(0, index[2], logprobs.double())
        misses = torch.zeros(count, dtype=torch.int64, device=self.device).index_add_(0, index[2], (~greedy).long())
        return [Score(logprob, missed == 0) for logprob, missed in zip(sums.tolist(), misses.tolist(), strict=True)]

    def _hidden(self, inputs: Sequence[tuple[int, ...]], last: Sequence[int]) -> Tensor:
        """Normed final states of the last so many positions of each input, one after another [n, w]."""
        width = max(map(len, inputs))
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in inputs], device=self.device)
        padding = torch.arange(width, device=self.device) >= torch.tensor([len(ids) for ids in inputs], device=self.device)[:, None]
        state = final_states(self.model, tokens, self.depth, padding)
        rows = [row for row, most in enumerate(last) for _ in range(most)]
        places = [place for ids, most in zip(inputs, last, strict=True) for place in range(len(ids) - most, len(ids))]
        index = torch.tensor([rows, places], device=self.device)
        return self.model.norm(state[index[0], index[1]])


def final_states(model: LanguageModel, tokens: Tensor, depth: Depth, padding: Tensor) -> Tensor:
    """What the final norm reads [b, s, w], of tokens [b, s]; where `padding` is true, on the right, nothing is solved for."""
    proposal, context = model.propose(tokens, None)
    return proposal if model.refine is None else model.refine(proposal, context._replace(padding=padding), depth).output


def token_scores(hidden: Tensor, weight: Tensor, positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(hidden[positions] weight^T)[wanted] in fp32, and whether `wanted` is the most likely, for [m] positions and tokens."""
    logprobs = torch.empty(len(wanted), device=hidden.device)
    greedy = torch.empty(len(wanted), dtype=torch.bool, device=hidden.device)
    size = max(1, _LOGITS_AT_ONCE // weight.shape[0])
    for start in range(0, len(hidden), size):
        logits = (hidden[start : start + size].to(weight.dtype) @ weight.T).float()
        asked = ((positions >= start) & (positions < start + size)).nonzero().squeeze(1)
        rows, tokens = positions[asked] - start, wanted[asked]
        logprobs[asked] = logits[rows, tokens] - torch.logsumexp(logits, dim=-1)[rows]
        greedy[asked] = logits.argmax(dim=-1)[rows] == tokens
    return logprobs, greedy
