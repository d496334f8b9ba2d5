"""The account of a run: tokens, FLOPs by part from what the solver was measured to do, and MFU against a stated peak.

    FLOPs of a step = tokens of the step * FLOPs a token(evaluations, applications, products a sequence, as measured)
    MFU = model FLOPs a second / (peak FLOP/s of one device * devices)

Model FLOPs leave recomputation out, hardware FLOPs hold it (model/cost.py has the conventions). Totals are sums over steps,
kept in the checkpoint, so a resumed run's ledger is the one it would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from model.cost import Flops, Work

PARTS = tuple(Flops.__dataclass_fields__)

PEAK_FLOPS: dict[str, tuple[float, float]] = {
    # device name contains: dense (bf16, tf32 matrix) peak in FLOP/s, from the vendors' data sheets, without sparsity
    "GB200": (2.5e15, 1.25e15),
    "B200": (2.25e15, 1.1e15),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "A10G": (70e12, 35e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 60e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI300X": (1307e12, 653e12),
    "MI250": (383e12, 95.7e12),
    "V100": (0.0, 15.7e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device by its name (the first entry found in it), or None where it is not known."""
    for name, (bf16, fp32) in PEAK_FLOPS.items():
        if name in device_name:
            return (bf16 if precision == "bf16" else fp32) or None
    return None


@dataclass
class Ledger:
    """Totals of a run."""

    a_token: Callable[[Work], Flops]
    """What a token of training costs where a sequence takes so much work (model.cost.training_flops); must not change during the run."""
    sequence_length: int
    tokens: int = 0
    evaluations: float = 0.0
    """Sequence-evaluations of f without gradients: in solves, and in a loop's first iterations."""
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def step(self, tokens: int, work: Work) -> Flops:
        """Enters one step of `tokens` tokens whose sequences took so much work, as measured; its FLOPs by part."""
        spent = Flops(**{part: tokens * value for part, value in asdict(self.a_token(work)).items()})
        self.tokens += tokens
        self.evaluations += work.evaluations * tokens / self.sequence_length
        for part, value in asdict(spent).items():
            self.parts[part] += value
        return spent

    @property
    def total(self) -> Flops:
        return Flops(**self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "evaluations": self.evaluations, "parts": dict(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.evaluations, self.parts = state["tokens"], state["evaluations"], dict(state["parts"])
