"""CORE: how often a model gives the right answer in DCLM's in-context tasks, above chance, in the manner of nanochat.

    multiple choice, schema     the choice whose scored tokens have the lowest mean loss is the answer
    language modelling          right if each scored token is the most likely one after those before it
    centred = (accuracy - baseline) / (1 - baseline);   CORE = mean of the tasks' centred accuracies

0 is guessing, 1 is all right; a task below chance counts negative. core_bundle.py reads the tasks, core_prompts.py
makes their prompts. The model is used at one depth. Prompts of like length share a batch and are padded on the right, which a causal
model does not see; but where a solve ends when the whole sequence is within the tolerance ("auto"), padding may move a loss within that
tolerance: "strict" ends each token's solve by itself.

Losses come from the model's own evaluation, which never holds the logits of a batch; the greedy match needs them, so its batches
are small enough. Source: nanochat, nanochat/core_eval.py; DCLM (arXiv 2406.11794).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline import open_manifest, open_tokenizer
from data_pipeline.token_bytes import tokenizer_file
from model.loss import IGNORE
from model.refine import Depth
from pretrain import durable
from pretrain.downstream.core_bundle import Task, read_bundle
from pretrain.downstream.core_prompts import Row, prompts, rows
from pretrain.errors import Refusal
from pretrain.run_folder import dump
from pretrain.runtime import device_of, settle_libraries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CORE = "core.json"
_QUESTIONS = 64  # of a task, made into ids at a time
_LOGITS_AT_ONCE = 1 << 28  # elements: 1 GiB in fp32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model, and how to use it. `window`: ids of a prompt at most; `batch_tokens`: of a batch about, padding included."""

    model: Any
    """Called as a LanguageModel in eval mode, `logits` included."""
    tokenizer: Tokenizer
    bos_id: int
    vocabulary: int
    depth: Depth
    window: int
    batch_tokens: int
    device: torch.device


@torch.no_grad()
def evaluate_core(subject: Subject, tasks: Sequence[Task], progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """{"core": mean centred accuracy, "tasks": [{"label", "type", "fewshot", "examples", "accuracy", "baseline", "centred", "cut"}]};
    `cut` is the share of prompts that were longer than the window. Raises Refusal for a model whose losses are not finite.
    """
    told: list[dict[str, Any]] = []
    done, total = 0, sum(len(task.examples) for task in tasks)
    for task in tasks:
        right = asked = cut = 0
        for start in range(0, len(task.examples), _QUESTIONS):
            numbers = range(start, min(start + _QUESTIONS, len(task.examples)))
            questions = _questions(subject, task, numbers)
            right += sum(_answers(subject, task, questions, numbers))
            asked += sum(map(len, questions))
            cut += sum(row.cut for question in questions for row in question)
            done += len(numbers)
            progress(done / total)
        accuracy = right / len(task.examples)
        told.append(
            {
                "label": task.label,
                "type": task.kind,
                "fewshot": task.fewshot,
                "examples": len(task.examples),
                "accuracy": accuracy,
                "baseline": task.baseline,
                "centred": (accuracy - task.baseline) / (1 - task.baseline),
                "cut": cut / asked,
            }
        )
    return {"core": math.fsum(row["centred"] for row in told) / len(told), "tasks": told}


def _questions(subject: Subject, task: Task, numbers: range) -> list[list[Row]]:
    """The prompts of these questions as ids, each behind the begin token."""
    texts = [prompts(task, number) for number in numbers]
    encodings = iter(subject.tokenizer.encode_batch_fast([text for question in texts for text in question], add_special_tokens=False))
    questions = []
    for number, question in zip(numbers, texts, strict=True):
        encoded = [[subject.bos_id, *next(encodings).ids] for _ in question]
        if min(map(len, encoded[-1:] if task.kind == "language_modeling" else encoded)) < 2:
            raise Refusal(f"Question {number} of {task.label} has a prompt without text: its fields are empty. Mend the example.")
        if (largest := max(map(max, encoded))) >= subject.vocabulary:
            raise Refusal(
                f"A prompt of {task.label} has the token id {largest}, but the model's vocabulary ends at {subject.vocabulary}: the "
                "tokenizer of the run's data has entries that the model lacks. Train with model.vocabulary_size of the data's manifest."
            )
        questions.append(rows(task.kind, encoded, subject.window))
    return questions


def _answers(subject: Subject, task: Task, questions: Sequence[list[Row]], numbers: range) -> list[bool]:
    """Whether the model is right, by question."""
    flat = [row for question in questions for row in question]
    if task.kind == "language_modeling":
        return [score == 1.0 for score in _scores(subject, flat, _greedy, min(subject.batch_tokens, _LOGITS_AT_ONCE // subject.vocabulary))]
    scores = iter(_scores(subject, flat, _mean_losses, subject.batch_tokens))
    right = []
    for number, question in zip(numbers, questions, strict=True):
        losses = [next(scores) for _ in question]
        right.append(losses.index(min(losses)) == task.examples[number]["gold"])
    return right


def _scores(subject: Subject, flat: Sequence[Row], score: Callable[..., Tensor], most_tokens: int) -> list[float]:
    """The score of every row, in batches of rows of like length; one host synchronisation a batch."""
    found = [math.nan] * len(flat)
    for numbers in _batches([len(row.ids) - 1 for row in flat], most_tokens):
        tokens, targets = _padded([flat[number] for number in numbers], subject.bos_id)
        values = score(subject, tokens.to(subject.device), targets.to(subject.device)).tolist()
        for number, value in zip(numbers, values, strict=True):
            found[number] = value
    if not all(map(math.isfinite, found)):
        raise Refusal("The model's losses on the tasks' prompts are not finite: this run has diverged, and nothing can be told from it.")
    return found


def _batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows, the shortest first, in batches of at most so many tokens when padded to the longest (at least one row)."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[number] > most_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _padded(batch: Sequence[Row], bos_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) [b, s] of the longest row's length; only what is scored is a target."""
    width = max(len(row.ids) for row in batch) - 1
    tokens, targets = torch.full((len(batch), width), bos_id), torch.full((len(batch), width), IGNORE)
    for number, row in enumerate(batch):
        ids = torch.tensor(row.ids)
        tokens[number, : len(ids) - 1] = ids[:-1]
        targets[number, row.start - 1 : len(ids) - 1] = ids[row.start :]
    return tokens, targets


def _mean_losses(subject: Subject, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the scored tokens [b], in nats."""
    _, record = subject.model(tokens, targets, None, (subject.depth,))
    (losses,) = (value for key, value in record.items() if key.startswith("nll/"))
    return losses.sum(dim=1) / (targets != IGNORE).sum(dim=1)


def _greedy(subject: Subject, tokens: Tensor, targets: Tensor) -> Tensor:
    """1 where every scored token is the most likely one, else 0; NaN where logits are not finite [b]."""
    highest, most_likely = subject.model.logits(tokens, None, subject.depth).max(dim=-1)
    right = ((most_likely == targets) | (targets == IGNORE)).all(dim=1)
    return torch.where(highest.isfinite().all(dim=1), right.float(), math.nan)


def evaluate_core_run(
    run: Path,
    bundle: Path,
    depth: Depth | None = None,
    limit: int | None = None,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """CORE of a run's newest whole checkpoint, at `depth` or the last of the recipe's own; `limit` examples a task at most. Also written to
    RUN/core.json. Raises Refusal for a run or a bundle that is not whole, before the model is loaded where it can.
    """
    tasks = read_bundle(bundle, limit)
    settle_libraries(device_of("auto"))
    from pretrain.loaded import load_run

    loaded = load_run(run)
    recipe = loaded.recipe
    path, cache = recipe.sources[0][0], recipe.data.cache
    manifest = open_manifest(path, cache)
    length = recipe.data.sequence_length or manifest.sequence_length
    listed = recipe.evaluation.iterations
    used: Depth = depth if depth is not None else "auto" if "auto" in listed else listed[-1]
    subject = Subject(
        model=loaded.model,
        tokenizer=open_tokenizer(tokenizer_file(path, cache)),
        bos_id=manifest.bos_id,
        vocabulary=recipe.model.vocabulary_size or manifest.vocabulary_size,
        depth=0 if recipe.model.kind == "transformer" else used,
        window=length + 1,
        batch_tokens=recipe.train.micro_batch * length,
        device=loaded.device,
    )
    report = {
        "run": str(run),
        "kind": recipe.model.kind,
        "step": loaded.step,
        "weights": loaded.which,
        "depth": str(subject.depth),
        "bundle": str(bundle),
        "max_per_task": limit,
        **evaluate_core(subject, tasks, progress),
    }
    try:
        durable.write_atomically(run / CORE, dump(report, indent=1) + "\n")
    except OSError as error:  # the figures are worth more than their copy
        logger.warning("%s could not be written: %s", run / CORE, error.strerror)
    return report
