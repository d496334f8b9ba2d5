"""A small bundle with known right answers, and the model that gives them: what it writes next depends on the last byte alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import BEGIN, begin_id, tokenizer_from_json, train_tokenizer
from model.loss import IGNORE

TOKENIZER = tokenizer_from_json(train_tokenizer(iter([""]), 257).to_str(), "test")  # a token a byte
BOS = begin_id(TOKENIZER, BEGIN)
TASKS = """\
icl_tasks:
- label: pick
  dataset_uri: some/pick.jsonl
  num_fewshot: [1]
  icl_task_type: multiple_choice
  continuation_delimiter: ' '
- label: fit
  dataset_uri: some/fit.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- {label: tell, dataset_uri: tell.jsonl, num_fewshot: 2, icl_task_type: language_modeling, continuation_delimiter: ': '}
"""
BASELINES = "Eval Task,Task Category,Random baseline\npick,x,50\nfit,x,50.0\ntell,x,0\nother,x,\n"
PICK = [{"query": f"q{n}", "choices": ["xa!", "xb!"], "gold": int(n == 2)} for n in range(4)]
FIT = [{"context_options": ["it is q", "it is p"], "continuation": "and z", "gold": n % 2} for n in range(4)]
TELL = [{"context": " say ", "continuation": "bcd" if n else "bcb", "more": 1} for n in range(4)]


def write_bundle(folder: Path) -> Path:
    """Right for `Next`: pick 3 of 4, fit 2 of 4, tell 3 of 4."""
    (folder / "eval_data/some").mkdir(parents=True)
    (folder / "core.yaml").write_text(TASKS)
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    for name, examples in (("some/pick", PICK), ("some/fit", FIT), ("tell", TELL)):
        (folder / f"eval_data/{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples) + "\n")
    return folder


def byte(character: str) -> int:
    """The token of one ASCII character."""
    (number,) = TOKENIZER.encode(character, add_special_tokens=False).ids
    return int(number)


class Next:
    """After each of these bytes the second is likelier than any other: x a, space b, b c, c d; after `:` and `q` a space."""

    def __init__(self) -> None:
        self.table = torch.zeros(257, 257)
        for pair in ("xa", ": ", " b", "bc", "cd", "q "):
            self.table[byte(pair[0]), byte(pair[1])] = 5.0
        self.rows = 0

    def logits(self, tokens: Tensor, documents: Tensor | None = None, depth: int | str = "auto") -> Tensor:
        self.rows += len(tokens)
        return self.table[tokens]

    def __call__(self, tokens: Tensor, targets: Tensor, documents: Any, depths: Any) -> tuple[Tensor, dict[str, Tensor]]:
        (depth,) = depths
        nll = torch.nn.functional.cross_entropy(self.logits(tokens).mT, targets, ignore_index=IGNORE, reduction="none")
        return nll.mean(), {f"nll/{depth}": nll, f"iterations/{depth}": torch.ones(len(tokens))}
