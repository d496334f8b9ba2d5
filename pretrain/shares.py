"""What a rank of each pipeline stage holds of a recipe's model, and the bytes that takes. No torch.

Blocks as pretrain/partition.py deals them out; embedding on the first stage, attractor, final norm and unembedding on the last. Under
1F1B stage p of P keeps the activations of at most P - p micro-batches. Sizes and formulas are model/memory.py's.
"""

from __future__ import annotations

from functools import lru_cache

from model.config import ModelConfig
from model.memory import Memory, Share, memory
from pretrain.config import Recipe
from pretrain.layout import Layout
from pretrain.partition import Stage, partition


def shares(recipe: Recipe, layout: Layout) -> list[tuple[Stage, Share]]:
    """The stages of a complete recipe on a layout and what a rank of each holds."""
    assert recipe.data.sequence_length is not None
    stages, count = layout.pipeline, recipe.check_world(layout.data)
    dealt = _partition(recipe.architecture, recipe.data.sequence_length, stages, recipe.train.recompute)
    held = []
    for p, stage in enumerate(dealt):
        ends, divided = (p == 0, p == stages - 1), recipe.layout.sequence_parallel
        held.append((stage, Share(stage.first, stage.stop, *ends, layout.tensor, divided, in_flight=min(count, stages - p))))
    return held


@lru_cache(maxsize=1024)
def _partition(config: ModelConfig, length: int, stages: int, recompute: bool) -> tuple[Stage, ...]:
    return tuple(partition(config, length, stages, recompute=recompute))


def stage_memory(recipe: Recipe, layout: Layout, share: Share, zero: int) -> Memory:
    """Bytes on a rank that holds `share`."""
    assert recipe.data.sequence_length is not None
    return memory(
        recipe.architecture,
        recipe.data.sequence_length,
        recipe.train.micro_batch,
        bytes_per_value=2 if recipe.train.precision == "bf16" else 4,
        zero=zero,
        data_ranks=layout.data,
        recompute=recipe.train.recompute,
        share=share,
        muon=recipe.optimizer.name == "muon",
        average=recipe.optimizer.ema is not None,
    )
