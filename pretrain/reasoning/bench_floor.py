"""The floor under a step: its blocks' matrix products alone, timed one by one on tensors of the same shapes and precision.

    forward  C [m, n] = A [m, k] B [k, n];     backward  A' = C B^T,  B' = A^T C
    floor = sum over products of  times a block * layers * ((evaluations + applications) forward + applications backward)

Norms, softmax, rotations, embeddings, heads, loss and optimizer count nothing, and neither does moving data between products.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from model.cost import Work
from model.reasoning.config import ReasonerConfig, ReasoningConfig
from pretrain.bench import wait


def products(config: ReasonerConfig, rows: int) -> list[tuple[int, int, int, int]]:
    """(matrices at a time, m, k, n) of every product of a block, forward, for so many puzzles."""
    length, width, hidden = config.length, config.width, config.hidden
    if config.mixing == "attention":
        heads, size = rows * config.heads, config.head_dim
        found = [(1, rows * length, width, 3 * width), (heads, length, size, length), (heads, length, length, size)]
        found.append((1, rows * length, width, width))
    else:
        mixing = config.mixing_hidden
        found = [(1, rows * width, length, 2 * mixing), (1, rows * width, mixing, length)]
    return [*found, (1, rows * length, width, 2 * hidden), (1, rows * length, hidden, width)]


class Floor:
    """Measures every product of a block once a call."""

    def __init__(self, config: ReasoningConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.device = config.model.layers, device
        self.shapes = products(config.model, rows)
        self.operands = [
            tuple(torch.randn(many, *shape, device=device, dtype=dtype).squeeze(0) for shape in ((m, k), (k, n), (m, n)))
            for many, m, k, n in self.shapes
        ]
        self.found: list[tuple[Tensor, Tensor]] = []
        """(forward, backward), each [wall, CPU] seconds of a block's products."""

    def measure(self) -> None:
        forward, backward = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for a, b, c in self.operands:
            forward += self._timed(a, b)
            backward += self._timed(c, b.mT) + self._timed(a.mT, c)
        self.found.append((forward, backward))

    def seconds(self, work: Work) -> tuple[float, float]:
        """(wall, CPU) of a step in which a sequence takes so much work; medians."""
        forward, backward = (torch.stack(parts).quantile(0.5, dim=0) for parts in zip(*self.found, strict=True))
        wall, cpu = self.layers * ((work.evaluations + work.applications) * forward + work.applications * backward)
        return float(wall), float(cpu)

    def _timed(self, left: Tensor, right: Tensor) -> Tensor:
        wait(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        torch.matmul(left, right)
        wait(self.device)
        return torch.tensor((time.perf_counter() - wall, time.process_time() - cpu), dtype=torch.float64)
