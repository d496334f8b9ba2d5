"""Rank arithmetic: how the ranks of a run are dealt out to pipeline stages, data replicas and tensor shards. No torch.

    rank = (pipe * data_size + data) * tensor_size + tensor          pipe outermost, tensor fastest

so that tensor ranks, which talk in every block and every solver iteration, are neighbours on one machine, and stages, which
talk least, are farthest apart. It is the order of DeepSpeed's PipeModelDataParallelTopology and of megatron's default
"tp-cp-ep-dp-pp"; pretrain/mesh.py makes the process groups of both from it and compares them.

All ranks of one model replica (same `data`) see the same samples: a loader takes the data coordinate, never the rank.
Refuses: a world that does not divide, and layouts a model cannot be cut into, naming the legal neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from model.config import BackboneConfig, ModelConfig
from pretrain.errors import Refusal

if TYPE_CHECKING:
    from pretrain.sections import LayoutSection

Axis = Literal["pipe", "data", "tensor"]


class Coordinates(NamedTuple):
    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes; their product is the world."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def cuts_model(self) -> bool:
        """Whether a rank holds less than the whole model for reasons other than ZeRO."""
        return self.pipeline > 1 or self.tensor > 1

    def coordinates(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(rest, self.data)
        return Coordinates(pipe, data, tensor)

    def rank(self, pipe: int, data: int, tensor: int) -> int:
        return (pipe * self.data + data) * self.tensor + tensor

    def groups(self, *axes: Axis) -> list[list[int]]:
        """The ranks that differ along `axes` alone, ascending; every rank is in exactly one group."""
        kept = [axis for axis in Coordinates._fields if axis not in axes]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            where = self.coordinates(rank)
            groups.setdefault(tuple(getattr(where, axis) for axis in kept), []).append(rank)
        return list(groups.values())

    def describe(self) -> str:
        """As a user writes it: `pipeline 2 x data 4 x tensor 2`."""
        return f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}"


def layout_on(section: LayoutSection, ranks: int) -> Layout:
    """The layout of a recipe on a world of `ranks`: data parallel fills the rest. Raises Refusal when they do not divide."""
    replica = section.tensor * section.pipeline
    if ranks % replica:
        near = sorted({max(1, ranks // replica) * replica, (ranks // replica + 1) * replica})
        raise Refusal(
            f"layout.tensor={section.tensor} and layout.pipeline={section.pipeline} make one replica of {replica} ranks, which does not "
            f"divide this world of {ranks}. Start {' or '.join(map(str, near))} ranks, or choose a layout whose tensor x pipeline "
            f"divides {ranks}."
        )
    return Layout(section.pipeline, ranks // replica, section.tensor)


def neighbours(value: int, legal: Iterable[int]) -> str:
    """The legal numbers next to `value`, below and above, as `2 or 4`."""
    known = sorted(set(legal))
    below, above = [n for n in known if n < value][-1:], [n for n in known if n > value][:1]
    return " or ".join(str(n) for n in below + above)


def refuse_illegal(section: LayoutSection, config: ModelConfig, sequence_length: int | None) -> None:
    """Raises ValueError, naming the remedy, for a layout this model cannot be cut into. Open sizes (None) are checked later."""
    tensor, pipeline, model = section.tensor, section.pipeline, config.model
    if pipeline > 1 and section.zero >= 2:
        raise ValueError(
            f"layout.zero={section.zero} cannot be combined with layout.pipeline={pipeline}: a stage accumulates the gradients of all its "
            "micro-batches, so they cannot be shared out before the last. Use layout.zero=1, or layout.pipeline=1."
        )
    if (tensor > 1 or pipeline > 1) and section.zero == 0:
        raise ValueError(
            f"layout.zero=0 cannot be combined with layout.tensor={tensor}, layout.pipeline={pipeline}: DeepSpeed then measures a wrong "
            "gradient norm across the ranks of a model. Use layout.zero=1, which costs nothing on one data rank."
        )
    divides_tokens = model.solves or section.sequence_parallel
    cut = _cut_by_tensor(model, sequence_length if divides_tokens else None)
    for what, size in cut.items():
        if size is not None and size % tensor:
            legal = [n for n in range(1, size + 1) if all(s is None or s % n == 0 for s in cut.values())]
            raise ValueError(
                f"layout.tensor={tensor} does not divide {what}={size}, so the ranks would not hold equal shards. For this model "
                f"layout.tensor may be {neighbours(tensor, legal)}."
            )
    if section.sequence_parallel and tensor == 1:
        raise ValueError(
            "layout.sequence_parallel=true divides tokens over tensor ranks, and layout.tensor=1 has one: leave it out, or raise tensor."
        )
    most = most_stages(config)
    if pipeline > most:
        raise ValueError(
            f"layout.pipeline={pipeline} leaves stages without blocks: {_what_is_dealt_out(config)} make at most {most} stages. "
            f"Use layout.pipeline={most} or less."
        )


def _what_is_dealt_out(config: ModelConfig) -> str:
    model = config.model
    if model.loops:
        return f"the {config.prelude} blocks before the loop, and loop and coda, whole on the last stage,"
    solved = " and the attractor, whole on the last stage," if model.solves else ""
    return f"model.backbone_layers={model.backbone_layers}{solved}"


def most_stages(config: ModelConfig) -> int:
    """Stages that can hold a block each; the attractor, or loop and coda, count as one."""
    return config.prelude + (config.model.solves or config.model.loops)


def _cut_by_tensor(model: BackboneConfig, sequence_length: int | None) -> dict[str, int | None]:
    return {
        "model.heads": model.heads,
        "model.kv_heads": model.key_value_heads,
        "model.mlp_width": model.hidden,
        "model.vocabulary_size": model.vocabulary_size,
        "data.sequence_length": sequence_length,
    }


def as_dict(layout: Layout, **more: Any) -> dict[str, Any]:
    """For records: the three sizes and what else names a layout."""
    return {"pipeline": layout.pipeline, "data": layout.data, "tensor": layout.tensor, **more}
