"""The prompts of a CORE example, and which of their tokens are scored. Plain Python; no torch.

    [shown example + blank line] x fewshot + question + delimiter + answer      one prompt a choice

    multiple_choice       scored from the first token at which the choices' prompts differ
    schema                scored over the tokens that all prompts end with
    language_modeling     scored from the end of the prompt without its continuation

All scored spans reach to the end of the prompt. Every prompt is a document of its own: the data's begin token (see
data_pipeline/tokenizer.py) stands where nanochat has <|bos|>. A prompt longer than a training window loses tokens on the left, the begin
token first. At least one token is scored, and one stands before it.

Which examples are shown is drawn as nanochat draws them. Source: nanochat, nanochat/core_eval.py; DCLM (arXiv 2406.11794).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.downstream.core_bundle import Example, Task

_SHOWN_SEED = 1234


@dataclass(frozen=True)
class Row:
    """One prompt as token ids; those from `start` (at least 1) on are scored."""

    ids: list[int]
    start: int
    cut: bool
    """Tokens were taken off its left end."""


def shown(task: Task, number: int) -> list[Example]:
    """The solved examples before question `number`: drawn from all others, by a seed that depends on the number alone."""
    drawn = random.Random(_SHOWN_SEED + number).sample(range(len(task.examples) - 1), task.fewshot)
    return [task.examples[index + (index >= number)] for index in drawn]


def prompts(task: Task, number: int) -> list[str]:
    """The texts of question `number`: one a choice; for language modelling without the continuation, and with it."""
    before = "".join(_solved(task, example) + "\n\n" for example in shown(task, number))
    example, delimiter = task.examples[number], task.delimiter
    if task.kind == "multiple_choice":
        return [f"{before}{example['query']}{delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        return [f"{before}{context}{delimiter}{example['continuation']}" for context in example["context_options"]]
    question = f"{before}{example['context'].strip()}{delimiter}"
    return [question.rstrip(), question + example["continuation"]]  # a space at the end would join the continuation's first token


def _solved(task: Task, example: Example) -> str:
    if task.kind == "multiple_choice":
        return example["query"] + task.delimiter + example["choices"][example["gold"]]
    if task.kind == "schema":
        return example["context_options"][example["gold"]] + task.delimiter + example["continuation"]
    return example["context"].strip() + task.delimiter + example["continuation"]


def rows(kind: str, encoded: Sequence[list[int]], window: int) -> list[Row]:
    """What to score of the encoded prompts of one question, each of at least 2 ids; the last `window` ids of each are kept."""
    if kind == "language_modeling":
        starts, encoded = [_common(encoded)], encoded[1:]
    elif kind == "schema":
        ending = _common([list(reversed(ids)) for ids in encoded])
        starts = [len(ids) - max(1, ending) for ids in encoded]
    else:
        starts = [min(_common(encoded), min(map(len, encoded)) - 1)] * len(encoded)
    made = []
    for ids, start in zip(encoded, starts, strict=True):
        cut = max(0, len(ids) - window)
        made.append(Row(ids[cut:], max(1, min(start, len(ids) - 1) - cut), cut > 0))
    return made


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
