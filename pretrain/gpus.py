"""What the model of step time (pretrain/scaling.py) assumes: GPUs in nodes of eight, and how this code uses one. No torch.

Peaks, memory, HBM, NVLink and adapters are from NVIDIA's data sheets of H100 SXM, H200 SXM and DGX H100 (peak FLOP/s: pretrain.ledger).
Shares of them, latency and launch time are assumptions: what well-made kernels and NCCL commonly reach, not what was measured here.
Counts of kernels and of passes over memory were made by reading model/.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_PASSES, BACKWARD_PASSES = 3, 6
"""Times a value kept for backward crosses HBM in eager mode, norms, rotations and residuals included; half as often when compiled."""
KERNELS, COMPILED_KERNELS, MIXING_KERNELS = 60, 20, 50
"""Launches of a block's forward (backward: twice that), and of the solver outside f an iteration."""
HOOKED = 2
"""Host time of backbone blocks under ZeRO 3, whose hooks fetch and release every module's weights, over that without."""
LOGIT_BYTES = 46
"""Bytes that model/loss.py moves a logit, beside its matrix products."""
LOGITS_AT_ONCE = 1 << 25
"""Of a chunk in model/loss.py."""
UPDATE_BYTES = 32
"""Bytes the optimizer moves a parameter: gradient, weight and moments read, all but the first written, and a bf16 copy."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, and its links to the others."""

    name: str
    memory: float
    """Bytes."""
    hbm: float
    """Bytes a second."""
    nvlink: float = 450e9
    """Bytes a second and direction, to the GPUs of the node."""
    network: float = 50e9
    """Bytes a second and direction of each GPU's own adapter: 400 Gbit/s."""
    node: int = 8
    matrix_share: float = 0.6
    """Of the peak FLOP/s, in matrix products and attention."""
    hbm_share: float = 0.8
    link_share: float = 0.8
    usable: float = 0.8
    """Of the memory: the rest is for CUDA, communication buffers, logits of a chunk, fragmentation, and the estimate's own error."""
    overlap: float = 0.8
    """Of ZeRO 3's communication that hides behind compute."""
    latency: float = 20e-6
    """Seconds a collective takes however small."""
    launch: float = 5e-6
    """Seconds of host time a kernel."""


GPUS = {"h100": Gpu("H100 SXM 80 GB", 80e9, 3.35e12), "h200": Gpu("H200 SXM 141 GB", 141e9, 4.8e12)}
