"""What the name of a published initialisation decides besides first weights: factors of the forward.

    embedding x sqrt(width)             takase, takase-scaled
    logits x sqrt(2 / 5) / sqrt(width)  takase-scaled
    logits x 1 / sqrt(width)            ROOT
    neither                             PLAIN, every published model (scaled-zero) among them

Source: attractor/utils/init.py of the public code. Residual and skip factors of its tables are read nowhere there.
"""

from __future__ import annotations

import math

from model.config import Kind
from pretrain.errors import Refusal
from pretrain.hub.published_options import Options

PLAIN = frozenset(
    {
        "mitchell",
        "normal",
        "llama",
        "llama-by-dim",
        "kaiming",
        "bert",
        "megatron",
        "megatron2",
        "small",
        "scaled",
        "scaled-geiping",
        "scaled-zero",
        "scaled-stuck",
        "wang",
        "deepnorm-straight",
        "deepnorm-subln",
        "bernstein",
        "illiterate",
        "scaled-large-embed",
    }
)
ROOT = ("llama-by-dim-ls", "noci-anagnostidis", "shaped", "deep-scale-simple", "deep-scale-full", "scaled-and-logit-scale")
_STATE_LIKE_OURS = ("small", "scaled", "scaled-geiping", "scaled-zero", "scaled-stuck")
"""Strategies whose embeddings start with std sqrt(2 / (5 width)), and Parcae's state with them."""


def read_scales(options: Options, kind: Kind, width: int) -> tuple[float, float]:
    """(factor of the embedding, factor of the logits). Raises Refusal for a name whose factors are not known or not expressible here."""
    strategy = options.get("init_strategy", "scaled", str)
    embedding, logits = 1.0, 1.0
    if strategy in ("takase", "takase-scaled"):
        embedding = math.sqrt(width)
    if strategy == "takase-scaled":
        logits = math.sqrt(2 / 5) / math.sqrt(width)
    elif strategy in ROOT:
        logits = 1 / math.sqrt(width)
    elif strategy not in PLAIN and strategy != "takase":
        raise Refusal(f"{options.where} has init_strategy={strategy!r}, which is none of the published ones: its scales are not known.")
    if kind == "transformer" and logits != 1:
        raise Refusal(
            f"{options.where} has init_strategy={strategy!r}, with which the published GPT scales its logits in the loss and not in what "
            f"it returns: which was meant is not known. It is not imported."
        )
    if kind == "parcae" and strategy not in _STATE_LIKE_OURS:
        raise Refusal(
            f"{options.where} has init_strategy={strategy!r}, with which the published Parcae's loop starts from noise of another size "
            f"than sqrt(2 / (5 width)), the one here. It is not imported."
        )
    return embedding, logits
