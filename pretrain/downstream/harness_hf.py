"""An export through lm-eval's own `hf` class, as its users run it: transformers, and the modelling file inside the export.

    lm_eval --model hf --model_args pretrained=EXPORT,trust_remote_code=True,add_bos_token=True,logits_cache=False --tasks lambada_openai

is the same thing, but for one repair. Where a tokenizer adds the begin token, `loglikelihood_rolling` of lm-eval 0.4.13 gives a text
two: its windows begin with it, and the tokenizer puts one more, which is then scored as the text's first token. Here windows hold the
text alone. `logits_cache` is off because it is wrong there: of two requests that read the same tokens and score different numbers of
them, it gives the shorter one the logits of an earlier position. transformers cannot read a run folder: export it first.
"""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


class ExportLM(HFLM):
    """lm-eval's `hf` on an export folder, begin token before every context and once."""

    def __init__(self, path: str, solver_iterations: int | str | None = None, dtype: str = "auto", **arguments: Any) -> None:
        self.cut = 0
        """Requests so far whose left end did not fit."""
        settings = {} if solver_iterations is None else {"solver_iterations": solver_iterations}
        super().__init__(
            pretrained=path, dtype=dtype, trust_remote_code=True, add_bos_token=True, logits_cache=False, **settings, **arguments
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.cut += sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm or not sys.stderr.isatty(), override_bs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.add_bos_token = False  # the windows bring it
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())
        finally:
            self.add_bos_token = True
