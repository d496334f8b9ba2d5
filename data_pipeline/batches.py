"""Windows of ids to the tensors of a micro-batch: B rows, S = sequence_length.

    window [S + 1]  ->  tokens = window[:-1], targets = window[1:]

A short window is filled up, tokens with the begin token, targets with -100. documents[b, t] counts the begin tokens in tokens[b, : t + 1],
so that attention can be kept inside documents; it is 0 up to the first, in what a window continues from the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import Refusal

IGNORED = -100  # a target that has no loss


class Batch(NamedTuple):
    """One micro-batch of one rank, on the CPU."""

    tokens: Tensor  # int64 [B, S]
    targets: Tensor  # int64 [B, S], -100 where there is none
    documents: Tensor  # int32 [B, S]
    sample_ids: Tensor  # int64 [B], global index within the mixture; -1 for a row that only pads


def make_batch(
    windows: Sequence[NDArray], sample_ids: NDArray[np.int64], sequence_length: int, bos_id: int, vocabulary_limit: int | None
) -> Batch:
    """Stack windows of at most S + 1 ids; an empty window makes a padding row. Refuses an id that is not below `vocabulary_limit`."""
    ids = np.full((len(windows), sequence_length + 1), bos_id, np.int64)
    lengths = np.array([len(window) for window in windows])
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = window
    if vocabulary_limit is not None and ids.max() >= vocabulary_limit:
        row, column = (int(index[0]) for index in np.nonzero(ids >= vocabulary_limit))
        raise past_vocabulary(int(ids[row, column]), int(sample_ids[row]), vocabulary_limit)
    targets = ids[:, 1:].copy()
    targets[np.arange(sequence_length)[None, :] >= lengths[:, None] - 1] = IGNORED
    tokens = ids[:, :-1]
    documents = np.cumsum(tokens == bos_id, axis=1, dtype=np.int32)
    return Batch(torch.from_numpy(tokens.copy()), torch.from_numpy(targets), torch.from_numpy(documents), torch.from_numpy(sample_ids))


def past_vocabulary(token: int, sample: int, limit: int, where: str = "The data") -> Refusal:
    """An id that the model has no embedding for."""
    return Refusal(
        f"{where} holds token id {token} (sample {sample}), but the model's vocabulary ends at {limit}. Set the model's vocabulary to at "
        f"least {token + 1} "
        "(the manifest's vocabulary_size), or train on data prepared with a smaller tokenizer."
    )
