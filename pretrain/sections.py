"""The sections of a recipe that are not the model's: one frozen record each, every key with its unit and default.

Types are strict (a word is no number, 1 is no true) and defaults are the published training settings (arXiv 2605.12466
and its code) where those exist. What must hold between sections is checked by `pretrain.config.Recipe`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """One section of a recipe: frozen, strict, nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunSection(Section):
    name: str = ""
    """What the run is called in tables and plots; the recipe's name unless said otherwise."""
    dir: str = ""
    """Run folder: config, metrics, checkpoints. Default: runs/<run.name>."""


class WeightedPath(Section):
    """One member of a mixture."""

    path: str
    weight: float = Field(gt=0)


class DataSection(Section):
    path: str | list[WeightedPath] | None = None
    """A prepared folder or URL, or a mixture: a list of {path, weight}."""
    sequence_length: Positive | None = None
    """Tokens a sequence; null takes the length the data was prepared with."""
    workers: int = Field(default=0, ge=0)
    """Loader processes a rank; 0 reads in the training process."""
    cache: str | None = None
    """Local folder for the shards of remote sets."""
    mask_documents: bool = False
    """Keep attention inside documents."""


class SharedTrainSection(Section):
    """What every run is told of its training, whatever it trains on."""

    seed: int = Field(default=0, ge=0)
    """Of initial weights, data order and noise."""
    micro_batch: Positive = 8
    """Sequences a rank takes through one forward and backward."""
    global_batch: Positive = 256
    """Sequences an optimizer step takes, over all data ranks and accumulation."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of matrix products; weights, optimizer and solver state stay fp32."""
    compile: bool = False
    """torch.compile of the backbone blocks and of the attractor's map."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    nonfinite_limit: Positive = 10
    """Skipped non-finite steps in a row that end the run (exit code 4)."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Peak FLOP/s of one device, for MFU; null looks common GPUs up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    hang_timeout: Annotated[float, Field(gt=0)] = 480.0
    """Seconds without progress after which a rank shows its stacks and ends (exit code 7); ranks meet within as many at the start.
    Below the 600 after which NCCL aborts by itself, without a word on where anyone stood."""
    check_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between checks that all copies of every tensor are equal and finite (the first three steps always have one); 0: never."""


class TrainSection(SharedTrainSection):
    recompute: bool = False
    """Recompute blocks in backward in place of keeping their activations."""
    tokens: Positive
    """Token budget of the whole run. Steps = floor(tokens / (global_batch * sequence_length))."""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "muon"
    """muon: backbone matrices by Muon, everything else by AdamW. adamw: everything by AdamW."""
    lr: Annotated[float, Field(gt=0)] = 8e-3
    """AdamW's learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.8, 0.95]
    """AdamW's decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-10
    """AdamW's, beside the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """AdamW's decay of backbone matrices; embeddings, norms and gates never decay."""
    muon_lr: Annotated[float, Field(gt=0)] = 8e-3
    """Muon's learning rate."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Nesterov momentum of Muon."""
    muon_steps: Positive = 5
    """Newton-Schulz iterations."""
    muon_weight_decay: NonNegative = 0.2
    """Cautious (only where update and weight agree in sign), falling linearly to 0 over the run."""
    attractor_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """The attractor's learning rate over `lr`; the attractor is always on AdamW."""
    attractor_weight_decay: NonNegative = 0.0
    """AdamW's decay of the attractor's matrices."""
    embedding_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """The embeddings' learning rate over `lr`."""
    clip: NonNegative = 1.0
    """Bound on the global gradient norm; 0 leaves it unbounded."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights; null keeps none."""


class ScheduleSection(Section):
    shape: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    """Of the learning rate over the token budget, after the warm-up."""
    warmup: Fraction = 0.0
    """Share of the tokens over which the rate rises linearly from 0."""
    decay: Fraction = 0.5
    """Trapezoid: share of the tokens over which the rate falls linearly at the end."""
    final: Fraction = 0.0
    """Rate at the end over the peak rate."""


class LayoutSection(Section):
    tensor: Positive = 1
    """Ranks that share each matrix (heads, MLP, vocabulary); data parallel fills what tensor x pipeline leave of the world."""
    pipeline: Positive = 1
    """Stages that share the blocks, by FLOPs; the attractor is whole on the last."""
    zero: int = Field(default=1, ge=0, le=3)
    """ZeRO stage over the data ranks: 0 shards nothing, 1 optimizer state, 2 and gradients, 3 and weights; with a pipeline 1."""
    sequence_parallel: bool = False
    """Divide the backbone's tokens over the tensor ranks between matrices (the solver's always are): less memory, equal traffic."""


class CheckpointSection(Section):
    every: Positive = 1000
    """Steps between checkpoints; the last step always saves one."""
    keep: Positive = 2
    """Newest checkpoints kept."""


class EvaluationSection(Section):
    every: Positive = 1000
    """Steps between evaluations; the last step always has one."""
    tokens: Positive | None = None
    """Validation tokens at most; null takes all."""
    iterations: Annotated[list[Annotated[int, Field(ge=0)] | Literal["auto", "strict"]], Field(min_length=1)] = [0, 1, 2, 4, "auto"]
    """Solver iterations to report a loss at; auto solves to the tolerance, strict as generation with a cache would."""


class TelemetrySection(Section):
    tensorboard: bool = False
    """Mirror metrics.jsonl to TensorBoard files in the run folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror metrics.jsonl to Weights & Biases; a failure there never ends a run."""
    project: str = "attractor"
    """Its project in Weights & Biases."""
