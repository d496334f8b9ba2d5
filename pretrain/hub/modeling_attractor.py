"""Attractor Models, and the models they are compared with, for `transformers`. One file: it needs torch and transformers alone.

    y0 = backbone(E(x));   y* = f(y*, y0);   logits = norm(y*) E^T

    attractor     y* solves the map named by attractor.injection, D(h) being what gated blocks add to h:
                  additive f = y0 + D(y + y0); concat f = y0 + D(W [y; y0]); init_only f = y + D(y);
                  cross_attention f = y0 + D(y) with keys and values read from y0
    deq           f = norm(h + D(h)), h = y + norm(y0): the state of a deep equilibrium model, which starts at zero
    transformer   y* = y0
    parcae        h <- core(a h + dt B e), e = norm(y0), a = exp(-dt exp(A_log)), dt = softplus(bias), loop.iterations times from noise;
                  y* = coda(C h)
    looped        h <- core(h + y0), loop.iterations times from zero; y* = coda(h)

`config.solver_iterations` says how far to go: "auto" solves each token to `config.solver_tolerance`, n takes n evaluations of f (or
iterations of the loop), 0 decodes the proposal y0 and costs what the backbone alone costs. It can be given to `from_pretrained`, and to any
call of the model or of `generate`. `model.last_iterations` [batch, tokens] holds the evaluations that each token of the last call took.

The solve is strictly causal. A token has settled once its own relative residual is below the tolerance, or has set no new low for
solver.patience evaluations (until those before it move it out of 4 tolerances); it is done, and frozen, once it and all before it have
settled. So logits depend neither on later tokens, nor on
padding, nor on the rest of the batch. Hence a cache can hold keys and values of f's attention: those of each token's equilibrium (within
the tolerance), or, for a fixed count and for loops, those of each iteration, in slots of their own: then the result is the uncached one.

With gradients on, the last application of f alone is differentiable (one-step gradient; a loop: its last loop.backprop iterations), and
no cache is kept. State and residuals are fp32 or wider, blocks compute in the precision of their weights.
Shapes: b batch, s tokens given, k keys (earlier tokens included), w width, d channels a head. Source: arXiv 2605.12466, 2604.12946.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "kind": "attractor",
        "vocabulary_size": None,
        "width": 768,
        "heads": 6,
        "kv_heads": None,
        "backbone_layers": 6,
        "mlp": "relu2",
        "mlp_width": None,
        "qk_norm": True,
        "rope_base": 10_000.0,
        "norm_eps": 1e-5,
        "value_embeddings": False,
        "value_gate_channels": 32,
        "tied_embeddings": True,
        "zero_output_init": True,
    },
    "attractor": {"layers": 1, "injection": "additive", "gate_initial": 0.75, "gate_maximum": 0.75},
    "solver": {
        "start": None,
        "method": "anderson",
        "mixing": "token",
        "history": 2,
        "damping": 1.0,
        "ridge": 1e-8,
        "tolerance": 3e-4,
        "max_iterations": 64,
        "min_iterations": 1,
        "patience": 3,
        "stop": "norm",
        "compaction": True,
        "expected_iterations": 6.0,
    },
    "loop": {"core": 2, "coda": 2, "iterations": 8, "backprop": 4},
}
"""The sections of the configuration as training knows them. Here the solve is per token whatever solver.mixing and solver.stop say."""

_TINY = 1e-30


class AttractorConfig(PretrainedConfig):
    """The four sections, and transformers' usual fields, which follow from them."""

    model_type = "attractor"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        attractor: dict[str, Any] | None = None,
        solver: dict[str, Any] | None = None,
        loop: dict[str, Any] | None = None,
        solver_iterations: int | str = "auto",
        solver_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for an unknown key of a section, and for a usual field that contradicts the sections."""
        for name, given in {"model": model, "attractor": attractor, "solver": solver, "loop": loop}.items():
            if unknown := (given or {}).keys() - DEFAULTS[name].keys():
                raise ValueError(f"{min(unknown)!r} is no key of the section {name!r}, which has {', '.join(DEFAULTS[name])}.")
            setattr(self, name, {**DEFAULTS[name], **(given or {})})
        self.solver_iterations = read_depth(solver_iterations)
        self.solver_tolerance = self.solver["tolerance"] if solver_tolerance is None else solver_tolerance
        m = self.model
        usual = {
            "vocab_size": m["vocabulary_size"],
            "hidden_size": m["width"],
            "num_hidden_layers": m["backbone_layers"],
            "num_attention_heads": m["heads"],
            "num_key_value_heads": m["kv_heads"] or m["heads"],
            "head_dim": m["width"] // m["heads"],
            "intermediate_size": m["mlp_width"] or 4 * m["width"],
            "tie_word_embeddings": m["tied_embeddings"],
        }
        for name, value in usual.items():
            if kwargs.setdefault(name, value) != value:
                raise ValueError(f"{name}={kwargs[name]} contradicts the section 'model', which makes it {value}.")
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)


def read_depth(value: int | str | None) -> int | str:
    """ "auto", or a number of evaluations. Raises ValueError for anything else."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise ValueError(f"solver_iterations={value!r} is neither 'auto' nor a number of iterations from 0.")


# --- keys and values of earlier tokens

Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the keys and values [b, heads, s, d] of the tokens given, returns those of all tokens so far [b, heads, k, d]."""


class Slots:
    """Where attention keeps keys and values: numbered layers of transformers' cache. Without a cache nothing is kept."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, slot: int) -> Store:
        """What is stored there stays."""

        def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if self.cache is None:
                return keys, values
            self._grow(slot)
            return self.cache.update(keys, values, slot)

        return store

    def rewrite(self, slot: int, done: Tensor) -> Store:
        """What is stored there waits: the next evaluation of f stores it anew, but for tokens that are done [b, s], until `settle`."""

        def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if self.cache is None:
                return keys, values
            if slot in self.waiting:
                held = done[:, None, :, None]
                old_keys, old_values = self.waiting[slot]
                keys, values = torch.where(held, old_keys, keys), torch.where(held, old_values, values)
            self.waiting[slot] = keys, values
            self._grow(slot)
            layer = self.cache.layers[slot]
            if layer.keys is None or layer.values is None or layer.get_seq_length() == 0:
                return keys, values
            return torch.cat((layer.keys, keys), dim=-2), torch.cat((layer.values, values), dim=-2)

        return store

    def settle(self) -> None:
        """Keeps what waits: of each token, what its last evaluation stored."""
        for slot, (keys, values) in self.waiting.items():
            self.append(slot)(keys, values)
        self.waiting.clear()

    def _grow(self, slot: int) -> None:
        assert self.cache is not None
        while len(self.cache.layers) <= slot:
            self.cache.layers.append(DynamicLayer())


class Context(NamedTuple):
    """What all blocks of one call share."""

    tokens: Tensor
    """[b, s]"""
    positions: Tensor
    """[b, s]"""
    cos: Tensor
    sin: Tensor
    """[b, 1, s, d / 2], fp32"""
    mask: Tensor | None
    """[b, 1, s, k], true where attention is allowed; None: causal over the tokens given."""
    slots: Slots


# --- blocks


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in the precision of x and returned in that of the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def reset(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).to(self.weight.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The same in the precision of x."""
        return normalised(x, self.eps) * self.weight.to(x.dtype)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square."""
    mean = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim=-1, keepdim=True)
    return x * (mean + eps).rsqrt().to(x.dtype)


class ChannelGate(nn.Module):
    """x * maximum * sigmoid(raw), one raw number a channel."""

    def __init__(self, width: int, initial: float, maximum: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(width))
        self.initial, self.maximum = initial, maximum
        self.reset()

    def reset(self) -> None:
        share = min(self.initial / self.maximum, 1 - 1e-6)
        nn.init.constant_(self.raw, math.log(share / (1 - share)))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        return x * (self.maximum * torch.sigmoid(raw)).to(x.dtype)


class ValueGate(nn.Module):
    """2 sigmoid(W x[..., :channels]) a key-value head: how much of a value embedding enters."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.channels = channels
        self.projection = nn.Linear(channels, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.projection(x[..., : self.channels]))


class Attention(nn.Module):
    """Causal self-attention: rotary positions (half-split), then RMS norm of queries and keys; keys and values from `memory` if given."""

    def __init__(self, m: dict[str, Any], value_embedding: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.qk_norm = m["heads"], m["kv_heads"] or m["heads"], m["qk_norm"]
        width, self.channels = m["width"], m["width"] // m["heads"]
        self.query = nn.Linear(width, self.heads * self.channels, bias=False)
        self.key = nn.Linear(width, self.kv_heads * self.channels, bias=False)
        self.value = nn.Linear(width, self.kv_heads * self.channels, bias=False)
        self.out = nn.Linear(self.heads * self.channels, width, bias=False)
        self.value_gate = ValueGate(m["value_gate_channels"], self.kv_heads) if value_embedding else None

    def forward(self, x: Tensor, context: Context, store: Store, memory: Tensor | None, extra: Tensor | None) -> Tensor:
        memory = x if memory is None else memory
        q = rotated(self._heads(self.query(x), self.heads), context)
        k = rotated(self._heads(self.key(memory), self.kv_heads), context)
        v = self.value(memory)
        if self.qk_norm:
            eps = torch.finfo(q.dtype).eps
            q, k = normalised(q, eps), normalised(k, eps)
        if self.value_gate is not None and extra is not None:
            v = v + (self.value_gate(x)[..., None] * extra.unflatten(-1, (self.kv_heads, self.channels))).flatten(-2)
        k, v = store(k, self._heads(v, self.kv_heads))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None and q.shape[-2] > 1, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.channels)).transpose(1, 2)


def rotated(x: Tensor, context: Context) -> Tensor:
    """x [b, heads, s, d] turned by its positions: channel i with channel i + d / 2."""
    cos, sin = context.cos.to(x.dtype), context.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """relu2: W2 relu(W1 x)^2. swiglu: W2 (silu(Wg x) * W1 x)."""

    def __init__(self, m: dict[str, Any]) -> None:
        super().__init__()
        hidden = m["mlp_width"] or 4 * m["width"]
        self.up = nn.Linear(m["width"], hidden, bias=False)
        self.gate = nn.Linear(m["width"], hidden, bias=False) if m["mlp"] == "swiglu" else None
        self.down = nn.Linear(hidden, m["width"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square() if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """What a pre-norm block adds to x: a = gate(attention(norm(x))), a + gate(mlp(norm(x + a))). In the backbone gates are absent."""

    def __init__(self, m: dict[str, Any], gates: dict[str, Any] | None = None, value_embedding: bool = False) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(m["width"], m["norm_eps"])
        self.attention = Attention(m, value_embedding)
        self.mlp_norm = RMSNorm(m["width"], m["norm_eps"])
        self.mlp = MLP(m)
        self.attention_gate = self._gate(m, gates)
        self.mlp_gate = self._gate(m, gates)

    @staticmethod
    def _gate(m: dict[str, Any], gates: dict[str, Any] | None) -> nn.Module:
        return nn.Identity() if gates is None else ChannelGate(m["width"], gates["gate_initial"], gates["gate_maximum"])

    def forward(self, x: Tensor, context: Context, store: Store, memory: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        memory = None if memory is None else self.attention_norm(memory)
        attended = self.attention_gate(self.attention(self.attention_norm(x), context, store, memory, extra))
        return attended + self.mlp_gate(self.mlp(self.mlp_norm(x + attended)))


class Backbone(nn.Module):
    """Blocks `which` of the model, one after the other; every other one, the last of the model included, may have a value embedding."""

    def __init__(self, m: dict[str, Any], which: range) -> None:
        super().__init__()
        tables = [m["value_embeddings"] and layer % 2 == (m["backbone_layers"] - 1) % 2 for layer in which]
        self.blocks = nn.ModuleList(Block(m, value_embedding=table) for table in tables)
        width = (m["kv_heads"] or m["heads"]) * (m["width"] // m["heads"])
        names = [str(layer) for layer, table in enumerate(tables) if table]
        self.value_embeddings = nn.ModuleDict({name: nn.Embedding(m["vocabulary_size"] or 0, width) for name in names})

    def forward(self, x: Tensor, context: Context, slot: int) -> Tensor:
        """x [b, s, w] after all blocks, whose keys and values go to the slots from `slot` on."""
        for layer, block in enumerate(self.blocks):
            extra = self.value_embeddings[str(layer)](context.tokens) if str(layer) in self.value_embeddings else None
            x = x + block(x, context, context.slots.append(slot + layer), None, extra)
        return x


# --- the fixed point


class Mixer:
    """The next point to evaluate f at, token by token: Anderson mixing of the last `history` differences, or the plain value.

    y <- f - dF gamma - (1 - beta)(r - dR gamma),  gamma = argmin ||r - dR gamma||,  r = f - y. A step that is not finite, or follows one
    that raised the residual, is replaced by the plain one.
    """

    def __init__(self, solver: dict[str, Any]) -> None:
        self.history = solver["history"] if solver["method"] == "anderson" else 0
        self.damping, self.ridge = solver["damping"], solver["ridge"]
        self.last: tuple[Tensor, Tensor] | None = None
        self.differences: list[tuple[Tensor, Tensor]] = []

    def next(self, y: Tensor, value: Tensor) -> Tensor:
        change = value - y
        plain = value if self.damping == 1 else torch.lerp(y, value, self.damping)
        last, self.last = self.last, (value, change)
        if self.history == 0 or last is None:
            return plain
        last_value, last_change = last
        self.differences = [(value - last_value, change - last_change), *self.differences][: self.history]
        gammas = least_squares([dr for _, dr in self.differences], change, self.ridge)
        mixed = plain
        for (df, dr), gamma in zip(self.differences, gammas, strict=True):
            mixed = mixed - gamma * (df - (1 - self.damping) * dr)
        bad = dot(change, change) > dot(last_change, last_change)
        for gamma in gammas:
            bad = bad | ~gamma.isfinite()
        return torch.where(bad, plain, mixed)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)


def least_squares(columns: list[Tensor], right: Tensor, ridge: float) -> list[Tensor]:
    """gamma_j [b, s, 1] of min ||right - sum_j gamma_j column_j||: L D L^T of the Gram matrix, D at least ridge times its diagonal."""
    n = len(columns)
    lower: list[list[Tensor]] = [[] for _ in range(n)]
    pivots: list[Tensor] = []
    halfway: list[Tensor] = []
    for i in range(n):
        products = []  # (L D) of row i
        for j in range(i):
            product = dot(columns[i], columns[j])
            for k in range(j):
                product = product - lower[i][k] * pivots[k] * lower[j][k]
            lower[i].append(product / pivots[j])
            products.append(product)
        size, rest = dot(columns[i], columns[i]), dot(columns[i], right)
        pivot = size
        for j in range(i):
            pivot = pivot - lower[i][j] * products[j]
            rest = rest - lower[i][j] * halfway[j]
        pivots.append(torch.maximum(pivot, ridge * size) + _TINY)
        halfway.append(rest)
    gammas = [rest / pivot for rest, pivot in zip(halfway, pivots, strict=True)]
    for i in reversed(range(n)):
        for j in range(i):
            gammas[j] = gammas[j] - lower[i][j] * gammas[i]
    return gammas


class Solved(NamedTuple):
    state: Tensor
    """[b, s, w]"""
    point: Tensor
    """[b, s, w]: what one differentiable application of f is to be taken at."""
    iterations: Tensor
    """[b, s]: evaluations of each token until it was done."""


@torch.no_grad()
def solve_fixed(f: Callable[[Tensor, int], Tensor], y: Tensor, solver: dict[str, Any], count: int) -> Solved:
    """`count` (at least 1) evaluations of f(y, iteration) for every token."""
    mixer, point, value = Mixer(solver), y, y
    for iteration in range(count):
        point = y
        value = f(point, iteration).to(y.dtype)
        y = mixer.next(point, value)
    return Solved(value, point, torch.full(y.shape[:2], count, device=y.device))


@torch.no_grad()
def solve_to_tolerance(f: Callable[[Tensor, Tensor], Tensor], y: Tensor, solver: dict[str, Any], tolerance: float, done: Tensor) -> Solved:
    """Evaluations of f(y, done) until every token is done, at most solver.max_iterations; done [b, s] at first: padding.

    The value kept is that of the last evaluation within the tolerance, else the one of the smallest residual.
    """
    mixer, state = Mixer(solver), y
    iterations = torch.zeros_like(done, dtype=torch.int64)
    since = torch.zeros_like(iterations)  # evaluations since a value was kept
    low = torch.full(done.shape, math.inf, dtype=y.dtype, device=y.device)
    settled = done.clone()
    for iteration in range(1, solver["max_iterations"] + 1):
        value = f(y, done).to(y.dtype)
        residual = (value - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(_TINY)
        iterations = iterations + ~done
        moved = (low < tolerance) & (residual > 4 * tolerance) & ~done  # by those before it: it begins anew
        settled, low = settled & ~moved, low.masked_fill(moved, math.inf)
        within = residual < tolerance
        keep = (within | (residual < low)) & ~done
        low, since = torch.where(keep, residual, low), torch.where(keep, 0, since + 1)
        state = torch.where(keep[..., None], value, state)
        if iteration >= solver["min_iterations"]:
            settled = settled | within | (since >= solver["patience"])
            done = done | settled.cummin(dim=-1).values
        if iteration == solver["max_iterations"] or bool(done.all()):
            break
        y = torch.where(done[..., None], state, mixer.next(y, value))
    return Solved(state, state, iterations)


# --- what lies between the proposal and the final norm


class Attractor(nn.Module):
    """The map f(y, y0) of an attractor or a deq."""

    def __init__(self, config: AttractorConfig) -> None:
        super().__init__()
        m, a = config.model, config.attractor
        self.injection = "deq" if m["kind"] == "deq" else a["injection"]
        self.blocks = nn.ModuleList(Block(m, gates=a) for _ in range(a["layers"]))
        self.merge = nn.Linear(2 * m["width"], m["width"], bias=False) if self.injection == "concat" else None
        self.input_norm = RMSNorm(m["width"], m["norm_eps"]) if self.injection == "deq" else None
        self.state_norm = RMSNorm(m["width"], m["norm_eps"]) if self.injection == "deq" else None

    def forward(self, y: Tensor, y0: Tensor, context: Context, stores: list[Store]) -> Tensor:
        """f(y, y0) [b, s, w] in the precision of y; stores: of the blocks."""
        if self.input_norm is not None and self.state_norm is not None:
            h = y + self.input_norm.wide(y0)
            return self.state_norm.wide(h + self.increment(h, context, stores))
        if self.injection == "additive":
            return y0 + self.increment(y + y0, context, stores)
        if self.merge is not None:
            merged = self.merge(torch.cat((y, y0), dim=-1).to(self.merge.weight.dtype))
            return y0 + self.increment(merged.to(y.dtype), context, stores)
        if self.injection == "cross_attention":
            return y0 + self.increment(y, context, stores, memory=y0)
        return y + (y0 - y0.detach()) + self.increment(y, context, stores)  # init_only: y0 only for its gradient

    def increment(self, h: Tensor, context: Context, stores: list[Store], memory: Tensor | None = None) -> Tensor:
        """D(h): the sum of what the blocks add."""
        total: Tensor | None = None
        for block, store in zip(self.blocks, stores, strict=True):
            added = block(h if total is None else h + total, context, store, memory)
            total = added if total is None else total + added
        assert total is not None
        return total


class Refine(nn.Module):
    """From the proposal to the equilibrium."""

    def __init__(self, config: AttractorConfig) -> None:
        super().__init__()
        self.config = config
        self.attractor = Attractor(config)

    def forward(self, proposal: Tensor, context: Context, depth: int | str, padding: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """(state [b, s, w], evaluations a token [b, s])."""
        y0 = proposal.to(torch.promote_types(proposal.dtype, torch.float32))
        kind, solver = self.config.model["kind"], self.config.solver
        start = solver["start"] or ("zero" if kind == "deq" else "proposal")
        beginning = y0 if start == "proposal" else torch.zeros_like(y0) if start == "zero" else noise(context, y0)
        if depth == 0:
            return (beginning if kind == "deq" else y0), torch.zeros_like(context.tokens)
        layers, slots = len(self.attractor.blocks), context.slots

        def fixed(y: Tensor, iteration: int) -> Tensor:
            stores = [slots.append(slot + iteration * layers + layer) for layer in range(layers)]
            return self.attractor(y, y0, context, stores)

        def adaptive(y: Tensor, done: Tensor) -> Tensor:
            return self.attractor(y, y0, context, [slots.rewrite(slot + layer, done) for layer in range(layers)])

        if depth == "auto" and solver["min_iterations"] == solver["max_iterations"]:
            depth = solver["max_iterations"]  # a fixed count: each iteration has keys of its own
        if isinstance(depth, int):
            solved = solve_fixed(fixed, beginning, solver, depth)
        else:
            solved = solve_to_tolerance(adaptive, beginning, solver, self.config.solver_tolerance, padding)
            slots.settle()
        if torch.is_grad_enabled():
            return self.attractor(solved.point, y0, context, [Slots(None).append(0)] * layers), solved.iterations
        return solved.state, solved.iterations


class DiagonalInjection(nn.Module):
    """a h + dt B e, with a diagonal 0 <= a < 1: parcae's way into its loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay_log = nn.Parameter(torch.empty(width))
        self.step_bias = nn.Parameter(torch.empty(width))
        self.input = nn.Linear(width, width, bias=False)
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.decay_log)
        nn.init.constant_(self.step_bias, math.log(math.expm1(-0.5 * math.log(1 / 5))))

    def decay(self, dtype: torch.dtype) -> Tensor:
        """a [w], below 1 in that precision."""
        rate = (self.decay_log.float() + F.softplus(self.step_bias.float()).log()).clamp_max(10).exp()
        return torch.exp(-rate).to(dtype).clamp_max(1 - torch.finfo(dtype).eps / 2)

    def drive(self, e: Tensor) -> Tensor:
        """dt B e [b, s, w]."""
        return self.input(e) * F.softplus(self.step_bias.float()).to(e.dtype)


class Loop(nn.Module):
    """From the prelude's output, through the loop, to the coda's: parcae and looped."""

    def __init__(self, config: AttractorConfig) -> None:
        super().__init__()
        m, loop = config.model, config.loop
        parcae, first, last = m["kind"] == "parcae", m["backbone_layers"] - loop["core"] - loop["coda"], m["backbone_layers"]
        self.iterations, self.backprop = loop["iterations"], loop["backprop"] if parcae else None
        self.norm = RMSNorm(m["width"], m["norm_eps"]) if parcae else None
        self.injection = DiagonalInjection(m["width"]) if parcae else None
        self.core = Backbone(m, range(first, first + loop["core"]))
        self.readout = nn.Linear(m["width"], m["width"], bias=False) if parcae else None
        self.coda = Backbone(m, range(first + loop["core"], last))

    def forward(self, proposal: Tensor, context: Context, depth: int | str, padding: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """(state [b, s, w], iterations a token [b, s])."""
        count = depth if isinstance(depth, int) else self.iterations
        e = proposal if self.norm is None else self.norm(proposal)
        drive = e if self.injection is None else self.injection.drive(e)
        h = torch.zeros_like(e) if self.injection is None else noise(context, e)
        learned = count if self.backprop is None else self.backprop
        for iteration in range(count):
            with torch.set_grad_enabled(torch.is_grad_enabled() and iteration >= count - learned):
                kept = h if self.injection is None else h * self.injection.decay(e.dtype)
                h = self.core(drive + kept, context, slot)
            slot += len(self.core.blocks)
        h = h if self.readout is None else self.readout(h)
        return self.coda(h, context, slot), torch.full_like(context.tokens, count)


def noise(context: Context, like: Tensor) -> Tensor:
    """N(0, 2 / (5 w)) [b, s, w], a function of the position alone: the same for all sequences, and for a token wherever it is computed.
    Drawn 256 positions at a time, since what a generator draws in one go depends on how much that is."""
    blocks, width = int(context.positions.max()) // 256 + 1, like.shape[-1]
    table = torch.empty((blocks, 256, width), device=like.device, dtype=like.dtype)
    generator = torch.Generator(like.device).manual_seed(0)
    for block in table:
        block.normal_(0.0, math.sqrt(2 / (5 * width)), generator=generator)
    return table.flatten(0, 1)[context.positions]


# --- the model


class AttractorForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model, with or without something to solve; the lecture above says what it computes."""

    config_class = AttractorConfig
    _no_split_modules = ["Backbone", "Refine", "Loop"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"  # type: ignore[assignment]
    _supports_sdpa = True

    def __init__(self, config: AttractorConfig) -> None:
        super().__init__(config)
        m, loop = config.model, config.loop
        self.loops, solves = m["kind"] in ("parcae", "looped"), m["kind"] in ("attractor", "deq")
        prelude = m["backbone_layers"] - (loop["core"] + loop["coda"] if self.loops else 0)
        self.embedding = nn.Embedding(config.vocab_size, m["width"])
        self.backbone = Backbone(m, range(prelude))
        self.refine = Refine(config) if solves else Loop(config) if self.loops else None
        self.norm = RMSNorm(m["width"], m["norm_eps"])
        self.head = None if m["tied_embeddings"] else nn.Linear(m["width"], config.vocab_size, bias=False)
        self.last_iterations: Tensor | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        solver_iterations: int | str | None = None,
        inputs_embeds: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the tokens [b, s] given, whose earlier ones are in `past_key_values`; attention_mask [b, k] covers both.

        use_cache: None takes config.use_cache, and False with gradients on. solver_iterations: None takes config.solver_iterations.
        Hidden states and attentions are not returned.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("This model needs input_ids: value embeddings are functions of the tokens.")
        depth = read_depth(self.config.solver_iterations if solver_iterations is None else solver_iterations)
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        cache = past_key_values if past_key_values is not None else DynamicCache() if use_cache else None
        self._check_cache(cache, depth)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):  # what a cache holds has no gradient
            context, padding = self._context(input_ids, attention_mask, position_ids, cache)
            state = self.backbone(self.embedding(input_ids), context, 0)
            self.last_iterations = torch.zeros_like(input_ids)
            if self.refine is not None:
                state, self.last_iterations = self.refine(state, context, depth, padding, len(self.backbone.blocks))
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            unembedding = (self.embedding if self.head is None else self.head).weight
            logits = F.linear(self.norm(state[:, kept]).to(unembedding.device), unembedding)
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def _check_cache(self, cache: Cache | None, depth: int | str) -> None:
        if getattr(cache, "is_compileable", False):
            raise ValueError("A cache of fixed length does not fit: a solve writes its slots anew. Use the default (dynamic) cache.")
        if cache is None or self.refine is None:
            return
        if (filled := getattr(cache, "solver_iterations", depth)) != depth:
            raise ValueError(f"This cache was filled at solver_iterations={filled!r}: at {depth!r} begin a new one.")
        cache.solver_iterations = depth  # type: ignore[attr-defined]

    def _context(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Context, Tensor]:
        """What the blocks share, and which of the tokens are padding [b, s]."""
        (batch, length), device = tokens.shape, tokens.device
        keys = length + (0 if cache is None else cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape != (batch, keys):
            raise ValueError(f"attention_mask must be [{batch}, {keys}] (earlier tokens included), not {list(attention_mask.shape)}.")
        padding, mask = torch.zeros_like(tokens, dtype=torch.bool), None
        positions = torch.arange(keys - length, keys, device=device).expand(batch, -1)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if padded or (keys > length and length > 1):
            queries = torch.arange(keys - length, keys, device=device)[:, None]
            mask = (torch.arange(keys, device=device) <= queries)[None, None]
        if padded and attention_mask is not None and mask is not None:
            real = attention_mask.bool()
            positions = (real.long().cumsum(dim=-1) - 1).clamp_min(0)[:, -length:]
            padding = ~real[:, -length:]
            itself = torch.arange(keys, device=device) == queries  # a token of padding sees itself, or softmax has no terms
            mask = (mask & real[:, None, None, :]) | itself
        positions = positions if position_ids is None else position_ids.expand(batch, -1)
        cos, sin = self._rotary(positions)
        return Context(tokens, positions, cos, sin, mask, Slots(cache)), padding

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of position * base^(-2i / d) [b, 1, s, d / 2], in fp32 from angles in float64."""
        channels = self.config.head_dim
        exponents = -torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angles = positions.cpu().double()[:, None, :, None] * self.config.model["rope_base"] ** exponents
        return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """As in transformers; the configuration's sections learn of it. Raises ValueError where value embeddings count rows too."""
        if self.config.model["value_embeddings"]:
            raise ValueError("The vocabulary cannot be resized: value embeddings have a row for each of its entries too.")
        resized = super().resize_token_embeddings(*args, **options)
        self.config.model["vocabulary_size"] = self.config.vocab_size
        return resized

    def get_output_embeddings(self) -> nn.Module | None:
        """The unembedding where it is a matrix of its own; tied, the embedding itself is read."""
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, (RMSNorm, ChannelGate, DiagonalInjection)):
            module.reset()
