"""Text to shards, shards to batches. Never imports model; torch and streaming are imported when a loader or a writer is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.errors import Refusal
from data_pipeline.manifest import Manifest, open_manifest
from data_pipeline.prepare import Progress, prepare
from data_pipeline.stats import Stats, stats
from data_pipeline.tokenizer import open_tokenizer
from data_pipeline.verify import VerifyReport, verify

if TYPE_CHECKING:
    from data_pipeline.loader import Batch, TokenLoader, ValidationLoader

_NEED_TORCH = ("Batch", "TokenLoader", "ValidationLoader")

__all__ = [
    "Batch",
    "Manifest",
    "Progress",
    "Refusal",
    "Stats",
    "TokenLoader",
    "ValidationLoader",
    "VerifyReport",
    "open_manifest",
    "open_tokenizer",
    "prepare",
    "stats",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The loaders, on first use (PEP 562): they need torch, which a login node may not have."""
    if name in _NEED_TORCH:
        from data_pipeline import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
