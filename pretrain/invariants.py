"""What must hold between ranks while a run goes on: copies of a tensor are equal to the last bit, and every value is finite.

    key     (name, tensor coordinate where tensor ranks hold shards, else None, data coordinate where ZeRO 3 has cut it, else None)
    record  sum b_i  and  sum i b_i  modulo 2^64 over the bits b_i of the values read as integers; whether all values are finite

Every rank makes a record of each of its parameters, all gather them, and equal keys must have equal records. This one rule covers
data replicas, parameters replicated on tensor ranks, and the tied embedding, which first and last stage hold under one name. Bits
that differ where they must not come from memory or links that fail, kernels that are not deterministic, or an error of ours: in
each case the ranks train different models from then on, and nothing else shows it.

The plain sum moves with any single changed bit; the weighted one with changes that cancel in it: a - b at places i and j moves it by
(a - b)(j - i), which is below 2^64 and not zero for values of up to 32 bits. A record costs one reading of the weights and no
synchronisation; all of them come to the host together. The first steps are checked because that is where a wrong layout shows.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pretrain.agreement import gather
from pretrain.errors import VIOLATED, RunStopped, name_ranks
from pretrain.mesh import Mesh

T = TypeVar("T")

FIRST_STEPS = 3

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements summed at a time: what fits the cache (0.5 MiB as 64-bit integers); on a GPU few launches and 32 MiB."""
_TOLD = 3
"""Violations spelt out."""

Key = tuple[str, int | None, int | None]
Record = tuple[int, int, bool]
Fact = tuple[str, int, int]


class Table(NamedTuple):
    """What one rank tells the others."""

    host: str
    records: dict[Key, Record]
    facts: dict[Fact, float]
    """By (name, data coordinate, stage): equal on all tensor ranks there."""


def due(step: int, every: int, first: int = 0) -> bool:
    """Whether to check after this step: the first three that this process takes (it began after step `first`), then every `every`.

    every = 0: never.
    """
    return every > 0 and (step - first <= FIRST_STEPS or step % every == 0)


def check(named_parameters: Iterable[tuple[str, Tensor]], mesh: Mesh, facts: Mapping[str, float]) -> None:
    """Checks this rank's parameters, by canonical names, and facts of the step against all ranks'. All ranks call it.

    Parameters on the meta device are other stages'. facts: numbers on which the tensor ranks of one replica and stage must agree, such
    as solver iterations. Raises RunStopped (code VIOLATED), the same on every rank.
    """
    where = mesh.where
    own = Table(socket.gethostname(), _records(named_parameters, mesh), {(name, where.data, where.pipe): n for name, n in facts.items()})
    tables = gather(own)
    if faults := violations(tables):
        more = f", and {len(faults) - _TOLD} more such violations" if len(faults) > _TOLD else ""
        raise RunStopped(
            f"The ranks no longer train one model: {'; '.join(faults[:_TOLD])}{more}. Go on with --resume, which starts every rank from "
            f"the last checkpoint. If the same host is named again, go on without that machine, whose memory or links are then to blame; "
            f"if the same tensor is, on any machine, then the code or this layout is wrong.",
            VIOLATED,
        )


def violations(tables: Sequence[Table]) -> list[str]:
    """One phrase a violation, in the order of the parameters; the tables are by rank. The same on every rank."""
    hosts = [table.host for table in tables]
    holders: dict[Key, dict[int, Record]] = defaultdict(dict)
    told: dict[Fact, dict[int, float]] = defaultdict(dict)
    for rank, table in enumerate(tables):
        for key, record in table.records.items():
            holders[key][rank] = record
        for fact, value in table.facts.items():
            told[fact][rank] = value
    faults = [phrase for key, records in holders.items() if (phrase := _record_fault(key, records, hosts))]
    return faults + [phrase for (name, *_), values in told.items() if (phrase := _fact_fault(name, values, hosts))]


def _record_fault(key: Key, records: Mapping[int, Record], hosts: Sequence[str]) -> str:
    name, tensor, data = key
    shard = f" (shard of tensor rank {tensor})" if tensor is not None else ""
    if data is not None:
        shard += f" (ZeRO share of data rank {data})"
    broken = [rank for rank, (*_, finite) in records.items() if not finite]
    if broken:
        whole = [rank for rank in records if rank not in broken]
        return f"{name}{shard} is not finite on {name_ranks(broken, hosts)}" + (f" but is on {name_ranks(whole, hosts)}" if whole else "")
    parties = _parties(records)
    if len(parties) == 1:
        return ""
    return (
        f"{name}{shard} has other bits on {' and others on '.join(name_ranks(party, hosts) for party in parties[1:])} than on "
        + name_ranks(parties[0], hosts)
    )


def _fact_fault(name: str, values: Mapping[int, float], hosts: Sequence[str]) -> str:
    parties = _parties(values)
    if len(parties) == 1:
        return ""
    told = " and ".join(f"{values[party[0]]:g} on {name_ranks(party, hosts)}" for party in [*parties[1:], parties[0]])
    return f"{name} is {told}, which must agree"


def _parties(answers: Mapping[int, T]) -> list[list[int]]:
    """The ranks that answered alike, the largest party first; of equal ones that with the lowest rank."""
    parties: dict[T, list[int]] = defaultdict(list)
    for rank, answer in answers.items():
        parties[answer].append(rank)
    return sorted(parties.values(), key=lambda party: (-len(party), party[0]))


def _records(named_parameters: Iterable[tuple[str, Tensor]], mesh: Mesh) -> dict[Key, Record]:
    """This rank's records, read from the device at once."""
    keys, rows = [], []
    for name, parameter in named_parameters:
        if parameter.is_meta:
            continue
        tensor = mesh.where.tensor if getattr(parameter, "tensor_model_parallel", False) else None
        cut = hasattr(parameter, "ds_tensor")
        keys.append((name, tensor, mesh.where.data if cut else None))
        rows.append(fingerprint(_share(parameter, mesh.where.data) if cut else parameter))
    if not rows:
        return {}
    return {key: (plain, weighted, bool(finite)) for key, (plain, weighted, finite) in zip(keys, torch.stack(rows).tolist(), strict=True)}


def _share(parameter: Tensor, data: int) -> Tensor:
    """What this data rank holds of a parameter that ZeRO 3 has cut, without the padding behind the last element."""
    share = parameter.ds_tensor  # type: ignore[attr-defined]
    held = parameter.ds_numel - data * share.numel()  # type: ignore[attr-defined]
    return share.flatten()[: max(0, min(held, share.numel()))]


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """[3] int64 on the tensor's device: the plain and the position-weighted sum of its bits modulo 2^64, and 1 if all values are finite."""
    values = tensor.detach().flatten()
    bits = values.view(_INTEGERS[values.element_size()])
    plain, weighted = (torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(2))
    finite = torch.ones((), dtype=torch.bool, device=tensor.device)
    size = _CHUNK[tensor.device.type]
    places = torch.arange(1, 1 + min(size, len(bits)), device=tensor.device)
    for start in range(0, len(bits), size):
        chunk = bits[start : start + size].to(torch.int64)
        chunk_sum = chunk.sum()
        plain += chunk_sum
        weighted += (chunk * places[: len(chunk)]).sum() + start * chunk_sum
        finite &= torch.isfinite(values[start : start + size]).all()
    return torch.stack([plain, weighted, finite.to(torch.int64)])
