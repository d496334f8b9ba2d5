"""Text after prompts, from the model of a run or an export: how prompts are encoded, tokens decoded as they come, and what it took.

A prompt is encoded as it is, after the token that begins every document; generation ends before that token, which begins the next one.
Text is handed out in whole characters: a byte-level token may be a part of one, and is held back until the others came.

The first token is drawn from the logits that the prompt gives; its time and its iterations are the prompt's, those of every other token
its own. What is made beyond the trained sequence length is told (`beyond_trained`): rotary positions go on, untrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.tokenizer import id_count
from model.generation import Sampling, Step, generate
from model.refine import Depth
from pretrain.errors import Refusal
from pretrain.loaded import LoadedModel, load_model
from pretrain.runtime import device_of, settle_libraries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character
_BEFORE = 8  # tokens of the prompt that are decoded with the first new one: some tokenizers mark a space by what stands before


def load_to_generate(path: Path) -> LoadedModel:
    """The model of a run or an export, on a GPU where there is one. Raises Refusal."""
    settle_libraries(device_of("auto"))
    return load_model(path)


def generate_text(
    loaded: LoadedModel,
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    depth: Depth | None = None,
    hand_out: Callable[[int, str], None] = lambda row, piece: None,
) -> dict[str, Any]:
    """At most `count` tokens after each prompt, as plain JSON: the texts, tokens a second, iterations a token.

    depth: "auto", or a fixed number of iterations; None takes the export's own, of a run "auto". hand_out: told of every piece of text when
    it is there, with the number of its prompt. Raises Refusal for a tokenizer that does not fit.
    """
    tokenizer, begin = loaded.tokenizer(), loaded.begin_id
    depth = getattr(loaded, "solver_iterations", "auto") if depth is None else depth
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    streams = [_Text(tokenizer, ids) for ids in encoded]
    iterations: list[list[int]] = [[] for _ in prompts]
    clock = [time.perf_counter()]
    for step in token_steps(loaded, tokenizer, begin, [[begin, *ids] for ids in encoded], count, sampling, depth):
        clock.append(time.perf_counter())
        for row, token in zip(step.rows, step.tokens, strict=True):
            hand_out(row, streams[row].add(token))
        for row, taken in zip(step.rows, step.iterations, strict=False):  # empty where nothing is solved
            iterations[row].append(taken)
    for row, stream in enumerate(streams):
        hand_out(row, stream.rest())
    lengths = [len(ids) + 1 for ids in encoded]
    return {
        "model": str(loaded.path),
        "weights": loaded.which,
        "kind": loaded.architecture.model.kind,
        "solver_iterations": depth,
        "sampling": asdict(sampling),
        "samples": [
            {"prompt": prompt, "text": stream.text, "tokens": stream.made, "ended": len(stream.made) < count, "iterations": taken}
            for prompt, stream, taken in zip(prompts, streams, iterations, strict=True)
        ],
        "prompt_tokens": sum(lengths),
        **_rates([len(stream.made) for stream in streams], iterations, clock),
        "beyond_trained": max(length + len(stream.made) for length, stream in zip(lengths, streams, strict=True)) > loaded.sequence_length,
        "sequence_length": loaded.sequence_length,
        "device": loaded.device.type,
        "threads": torch.get_num_threads(),
    }


def token_steps(
    loaded: LoadedModel, tokenizer: Tokenizer, end: int, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, depth: Depth
) -> Iterator[Step]:
    """`generate` among the ids that the tokenizer has. Raises Refusal for logits that are not finite."""
    try:
        yield from generate(loaded.model, prompts, count, sampling, depth, end, id_count(tokenizer))
    except FloatingPointError as error:
        raise Refusal(
            f"The logits of {loaded.path} ({loaded.which}) are not finite, so no token can be chosen: training diverged, or the weights "
            "are damaged. Give a run or an export whose loss is a number."
        ) from error


def _rates(made: list[int], iterations: list[list[int]], clock: list[float]) -> dict[str, Any]:
    """clock: the beginning, and the end of every step. The first step is the prompt's."""
    own = [taken for of_row in iterations for taken in of_row[1:]]
    after_first, prompt_done = sum(max(0, tokens - 1) for tokens in made), clock[min(1, len(clock) - 1)]
    seconds = clock[-1] - prompt_done
    return {
        "prompt_seconds": prompt_done - clock[0],
        "tokens": sum(made),
        "seconds": seconds,
        "tokens_per_second": after_first / seconds if after_first else None,
        "iterations_per_token": sum(own) / len(own) if own else None,
    }


class _Text:
    """New tokens after a prompt's, as text that grows by whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer, self.text, self.made = tokenizer, "", list[int]()
        self._ids = prompt[-_BEFORE:]
        self._from, self._read = 0, len(self._ids)  # decoded from here on, of which so many tokens were handed out

    def add(self, token: int) -> str:
        """The text that is whole with this token: often a word, at times nothing."""
        self.made.append(token)
        self._ids.append(token)
        return self._new(hold=True)

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        return self._new(hold=False)

    def _new(self, hold: bool) -> str:
        before = self.tokenizer.decode(self._ids[self._from : self._read])
        now = self.tokenizer.decode(self._ids[self._from :])
        if len(now) <= len(before) or (hold and now.endswith(_BROKEN)):
            return ""
        self._from, self._read = self._read, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece
