"""lm-eval's model class for runs and exports, `--model attractor`: no engine, no transformers, no trust_remote_code.

    attractor evaluate RUN --tasks lambada_openai                           our own command (harness_tasks.py)
    python -m pretrain.downstream.harness --model attractor \\
        --model_args path=RUN --tasks lambada_openai                        lm-eval's command line, this class known

lm-eval 0.4.13 has no entry point by which an installed package could add a model class: its registry must be told, by importing this file,
before its command line reads `--model`. Run as a module this file does both.

The token that begins every document in training begins every context, once: an empty context is that token alone; a text that already
spells it out is not given another. Windows of `loglikelihood_rolling` are lm-eval's own, the first of them behind the begin token. What is
longer than a training window loses its left end, begin token first, as in lm-eval's `hf`. So token ids are those of lm-eval's `hf`
class on an export (harness_hf.py).

Nothing is kept from one call to the next. Source: lm-eval 0.4.13, api/model.py and models/huggingface.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from model.generation import Sampling
from model.refine import Depth
from pretrain.downstream.harness_scores import Row, Scorer
from pretrain.errors import Refusal
from pretrain.generate import token_steps
from pretrain.loaded import LoadedModel, LoadedRun, load_model
from pretrain.runtime import device_of, settle_libraries

NAME = "attractor"
DTYPES = {"auto": None, "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
_NEW_TOKENS = 256
"""Of `generate_until` where a task sets no bound; that of lm-eval's `hf`."""
_GENERATED_AT_ONCE = 32
"""Rows of `generate_until` at a time where no batch size is given."""

Encoded = tuple[Any, list[int], list[int]]
"""(request, context, continuation) as TemplateLM hands them on."""


class AttractorLM(TemplateLM):
    """A run folder or an export, `path`. Raises Refusal for a path that is neither, and for arguments it does not know.

    solver_iterations: evaluations of f (loops) for every token; None, "auto" and "strict" solve each token to the tolerance (a loop: its
    own count); None of an export: as its config.json says. batch_size: rows at a time, "auto" fits them to the device. dtype: auto (that of
    training), float32 or bfloat16.
    """

    def __init__(
        self,
        path: str,
        solver_iterations: int | str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        settle_libraries(device_of("auto"))
        if dtype not in DTYPES:
            raise Refusal(f"dtype={dtype} is not known: give one of {', '.join(DTYPES)}.")
        self.loaded: LoadedModel = load_model(Path(path), device=_device(device), dtype=DTYPES[dtype])
        self._device = self.loaded.device
        self._tokenizer = self.loaded.tokenizer()
        self._begin_id = self.loaded.begin_id
        self._begin = self._tokenizer.id_to_token(self._begin_id)
        self.depth = depth_of(solver_iterations, self.loaded)
        self.scorer = Scorer(self.loaded.model, self.loaded.device, self.depth, _batch(batch_size, max_batch_size))
        self.cut = 0
        """Requests so far whose left end did not fit."""

    @property
    def eot_token_id(self) -> int:
        """What begins a document also ends the one before."""
        return self._begin_id

    @property
    def max_length(self) -> int:
        """Tokens the model reads at most: those of a training window."""
        return self.loaded.sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, behind the begin token unless add_special_tokens is False."""
        ids: list[int] = self._tokenizer.encode(string.removeprefix(self._begin), add_special_tokens=False).ids
        return ids if add_special_tokens is False else [self._begin_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation. Bars only where there is a terminal."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm or not sys.stderr.isatty()) as bar:
            scores = self.scorer.scores(rows, bar.update)
        if not all(math.isfinite(score.logprob) for score in scores):
            raise Refusal(
                f"A log-likelihood of {self.loaded.path} ({self.loaded.which}) is not finite: training diverged, or the weights are "
                "damaged. Give a run or an export whose loss is a number."
            )
        return [(score.logprob, score.greedy) for score in scores]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not 0 < len(continuation) <= self.max_length:
            raise Refusal(
                f"A continuation of {len(continuation)} tokens cannot be scored: it must have at least one, and no more than the "
                f"{self.max_length} of a training window of {self.loaded.path}. Leave this task out for this model."
            )
        ids = [*context, *continuation]
        self.cut += len(ids) > self.max_length + 1
        return Row(tuple(ids[-(self.max_length + 1) : -1]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token once, in lm-eval's windows."""
        windows: list[Encoded] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            of_text = get_rolling_token_windows(ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            new = [(None, *make_disjoint_window(window)) for window in of_text]
            windows += new
            counts.append(len(new))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of the `until` strings, which is left out, the next document's beginning, or max_gen_toks. Greedy, unless
        a task asks for a temperature."""
        texts: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda number: (json.dumps(requests[number].args[1]), requests[number].args[0]))
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm or not sys.stderr.isatty()) as bar:
            for _, group in groupby(order, key=lambda number: json.dumps(requests[number].args[1])):
                numbers = list(group)
                rows = self.scorer.batch or _GENERATED_AT_ONCE
                for part in (numbers[start : start + rows] for start in range(0, len(numbers), rows)):
                    made = self._generate([requests[number].args[0] for number in part], requests[part[0]].args[1], len(texts))
                    texts.update(zip(part, made, strict=True))
                    bar.update(len(part))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any], seed: int) -> list[str]:
        """seed: of the first of them; the next has the next, whatever the batches."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        until = handle_stop_sequences(wanted["until"], self._begin)
        count = wanted["max_gen_toks"]
        if count >= self.max_length:
            raise Refusal(
                f"A task asks for up to {count} new tokens, and the window of {self.loaded.path} is {self.max_length}: nothing of the "
                "prompt would fit. Give the task a smaller max_gen_toks (lm-eval's command line: --gen_kwargs), or leave it out."
            )
        prompts = [self.tok_encode(context) for context in contexts]
        self.cut += sum(len(prompt) > self.max_length - count for prompt in prompts)
        temperature = wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0
        sampling = Sampling(temperature=temperature, top_k=wanted.get("top_k"), top_p=wanted.get("top_p"), seed=seed)
        made: list[list[int]] = [[] for _ in prompts]
        ended: set[int] = set()
        tail = 4 + max(len(stop.encode()) for stop in until)  # no token stands for less than a byte
        kept = [prompt[-(self.max_length - count) :] for prompt in prompts]
        for step in token_steps(self.loaded, self._tokenizer, self._begin_id, kept, count, sampling, self.depth):
            for row, token in zip(step.rows, step.tokens, strict=True):
                made[row].append(token)
                if row not in ended and any(stop in self._tokenizer.decode(made[row][-tail:]) for stop in until if stop):
                    ended.add(row)
            if ended.issuperset(step.rows):
                break
        return [postprocess_generated_text(self._tokenizer.decode(ids), until, None) for ids in made]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model."""
        loaded = self.loaded
        return {
            "path": str(loaded.path),
            "weights": loaded.which,
            "kind": loaded.architecture.model.kind,
            "solver_iterations": self.depth,
            "model_num_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "model_dtype": str(loaded.model.unembedding.dtype),
            "begin_token": [self._begin, self._begin_id],
            "max_length": self.max_length,
            **({"step": loaded.step} if isinstance(loaded, LoadedRun) else {}),
        }


def depth_of(asked: int | str | None, loaded: LoadedModel) -> Depth:
    """A count, or "strict". Raises Refusal for what is neither."""
    from pretrain.hub.export import LoadedExport

    if asked is None:
        asked = loaded.solver_iterations if isinstance(loaded, LoadedExport) else "strict"
    if asked in ("auto", "strict"):
        return "strict"
    if str(asked).isdecimal():
        return int(asked)
    raise Refusal(f"solver_iterations={asked} is no number of solver iterations: give a number from 0, auto or strict.")


def _device(name: str | None) -> torch.device | None:
    """None, this machine's own, also for a GPU that is not there: lm-eval's command line says cuda:0 where nobody said anything."""
    return None if name is None or (name.startswith("cuda") and not torch.cuda.is_available()) else torch.device(name)


def _batch(size: int | str | None, most: int | None) -> int | None:
    """Rows at a time; None for what fits."""
    if size is None or str(size).startswith("auto"):
        return most
    if not str(size).isdecimal() or int(size) == 0:
        raise Refusal(f"batch_size={size} is no number of rows: give a number from 1, or auto.")
    return int(size)


def main() -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")


model_registry.register(NAME, target="pretrain.downstream.harness:AttractorLM")  # by name: run as a module, this file is imported twice

if __name__ == "__main__":
    main()
