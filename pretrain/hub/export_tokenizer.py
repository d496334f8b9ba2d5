"""The tokenizer of an export: files that transformers' AutoTokenizer reads, with the begin token before every text, once.

In training the begin token begins every document, and what a text spells out is text, the name of that token too. So the exported
tokenizer.json has a template that puts the token before a text (`add_special_tokens=False` leaves it out), whatever template it came with,
and tokenizer_config.json switches off the reading of special tokens in a text. The token is the end of a generation too, since it is the
beginning of the next document, and it pads, on the left: what it pads is masked. Ids are those of training, every one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data_pipeline.tokenizer import begin_id, id_count, tokenizer_from_json
from pretrain.errors import Refusal
from pretrain.loaded import refuse_misfit

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
PROMPT = "The first thing to know about a river is where it begins: high up, it is a trickle, cold and clear, and nobody's."
"""A real text, to compare models and tokenizers on."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """The files' texts by name, the begin token's id, and the ids of PROMPT as a document of training would have them."""

    files: dict[str, str]
    begin_id: int
    ids: int
    """One more than its largest id; the rows of the embedding from there on are padding."""
    prompt: list[int]


def export_tokenizer(text: str, where: str, rows: int, sequence_length: int) -> ExportedTokenizer:
    """From the text of a run's tokenizer.json. Raises Refusal for one that does not fit `rows` of an embedding, or cannot begin a text."""
    from tokenizers import AddedToken, processors

    tokenizer = tokenizer_from_json(text, where)
    refuse_misfit(tokenizer, rows, where)
    begin = begin_id(tokenizer, where)
    token = tokenizer.id_to_token(begin)
    prompt = [begin, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B:1"], special_tokens=[(token, begin)]
    )
    if tokenizer.encode(PROMPT).ids != prompt:
        raise Refusal(
            f"The tokenizer {where} does not put {token} before a text when asked to: it cannot be exported. Prepare the data anew."
        )
    names = {"bos_token": token, "eos_token": token, "pad_token": token}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        TOKENIZER: tokenizer.to_str(pretty=True) + "\n",
        TOKENIZER_CONFIG: json.dumps(settings, indent=2) + "\n",
        SPECIAL_TOKENS: json.dumps(names, indent=2) + "\n",
    }
    return ExportedTokenizer(files, begin, id_count(tokenizer), prompt)
