"""The optimizer: parameter groups by module role, and one torch optimizer that runs AdamW, Muon and sign-SGD side by side.

| role | update | learning rate | weight decay |
|---|---|---|---|
| backbone matrices | `name`: muon or adamw | muon_lr or lr | muon_weight_decay (cautious, fading to 0) or weight_decay |
| backbone vectors (norms, gates) | adamw | lr | 0 |
| matrices into and out of a loop's state | adamw | lr | 0 |
| attractor matrices | adamw | lr * attractor_lr_scale | attractor_weight_decay |
| attractor vectors | adamw | lr * attractor_lr_scale | 0 |
| embeddings, value embeddings, untied head | adamw | lr * embedding_lr_scale | 0 |

An untied head takes the rule of the table it would be tied to, so that untying changes one thing.
A reasoner has two groups: its puzzle embeddings, stepped by sign (`puzzle_groups`), and all else, AdamW with one decay for everything.
`MuonAdamW` is made before `deepspeed.initialize`, over the model's own parameters, and given to it as client optimizer.
DeepSpeed then replaces each group's parameters by this rank's flat fp32 partition, and calls `step` once a group (ZeRO 1,
2), once a sub-group (ZeRO 3) or once (ZeRO 0, and bf16 ZeRO 1), with gradients that are already reduced, clipped by their
global norm and finite. AdamW does not care; for Muon `zero.attach` supplies the table that says which matrices the
partition holds. With plain fp32 parameters (ZeRO 0, or no DeepSpeed) nobody has clipped: then this class does.
Refuses: a parameter without a role, a flat Muon partition without its table, and a table that does not hold every matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.roles import Role
from pretrain.muon import MatrixPieces, apply_update, momentum_mix, orthogonalised
from pretrain.schedule import learning_rate_scale, weight_decay_scale

if TYPE_CHECKING:
    from pretrain.reasoning.sections import PuzzleOptimizerSection
    from pretrain.sections import OptimizerSection, ScheduleSection

ADAMW = "adamw"
MUON = "muon"
SIGN = "sign"


def _rule(role: Role, settings: OptimizerSection) -> tuple[str, float, float]:
    """(update, learning rate, weight decay) of one role: the table above."""
    attractor_lr = settings.lr * settings.attractor_lr_scale
    match role:
        case Role.BACKBONE_MATRIX if settings.name == MUON:
            return MUON, settings.muon_lr, settings.muon_weight_decay
        case Role.BACKBONE_MATRIX:
            return ADAMW, settings.lr, settings.weight_decay
        case Role.BACKBONE_VECTOR | Role.LOOP_MATRIX:
            return ADAMW, settings.lr, 0.0
        case Role.ATTRACTOR_MATRIX:
            return ADAMW, attractor_lr, settings.attractor_weight_decay
        case Role.ATTRACTOR_VECTOR:
            return ADAMW, attractor_lr, 0.0
        case Role.EMBEDDING | Role.VALUE_EMBEDDING | Role.HEAD:
            return ADAMW, settings.lr * settings.embedding_lr_scale, 0.0
        case Role.PUZZLE_EMBEDDING:
            raise ValueError("A puzzle embedding belongs to a reasoner, whose groups are those of puzzle_groups.")


def parameter_groups(model: nn.Module, roles: Mapping[str, Role], settings: OptimizerSection) -> list[dict[str, Any]]:
    """One group a role that occurs, in the order of `Role`; `roles` is by parameter name (model.roles.parameter_roles).

    `initial_lr` and `initial_weight_decay` are what `apply_schedule` scales. Raises ValueError for a trainable parameter
    without a role.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    homeless = [name for name in trainable if name not in roles]
    if homeless:
        raise ValueError(f"No role, hence no learning rate, for {', '.join(homeless)}: let the owning module declare one.")
    groups = []
    for role in Role:
        parameters = [parameter for name, parameter in trainable.items() if roles[name] is role]
        if not parameters:
            continue
        update, lr, weight_decay = _rule(role, settings)
        group = {"params": parameters, "name": role.value, "update": update, "betas": tuple(settings.betas), "eps": settings.eps}
        group |= _rates(lr, weight_decay)
        if update == MUON:
            group |= {"muon_momentum": settings.muon_momentum, "muon_steps": settings.muon_steps}
        groups.append(group)
    return groups


def puzzle_groups(model: nn.Module, roles: Mapping[str, Role], settings: PuzzleOptimizerSection) -> list[dict[str, Any]]:
    """AdamW of everything (published: all of it decays, at the same rate), and sign-SGD of the puzzle embeddings where there are some."""
    sides: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        sides[roles[name] is Role.PUZZLE_EMBEDDING].append(parameter)
    adamw_rule = {"update": ADAMW, "betas": tuple(settings.betas), "eps": settings.eps}
    groups = [{"params": sides[False], "name": "network", **adamw_rule, **_rates(settings.lr, settings.weight_decay)}]
    if sides[True]:
        rates = _rates(settings.puzzle_lr, settings.puzzle_weight_decay)
        groups.append({"params": sides[True], "name": Role.PUZZLE_EMBEDDING.value, "update": SIGN, **rates})
    return groups


def _rates(lr: float, weight_decay: float) -> dict[str, float]:
    return {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "initial_weight_decay": weight_decay}


class MuonAdamW(torch.optim.Optimizer):
    """AdamW for groups with update "adamw", Muon for "muon", sign-SGD for "sign"; the gradients of a step are used up.

    State by parameter (or partition), all fp32: `step`, `exp_avg` and `exp_avg_sq` for AdamW, `momentum_buffer` for Muon, nothing for
    sign-SGD; with `ema` also `ema`, the average of the weights (see ema.py). Shaped like the parameter, so sharded, saved and
    restored with it. fused: torch's fused AdamW kernel, meant for accelerators.
    orthogonalise_dtype: of the Newton-Schulz products; None takes bf16 on an accelerator and fp32 on the CPU.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        ema: float | None = None,
        fused: bool = False,
        orthogonalise_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"fused": fused})
        self.ema = ema
        self.muon_tensors = sum(len(group["params"]) for group in self.param_groups if group["update"] == MUON)
        """How many tensors Muon updates, those of this rank's pipeline stage; `attach_pieces` holds the partitions to it."""
        self.overflow = False
        """DeepSpeed reads it after `step`: whether the step was skipped because the gradient norm was not finite."""
        self._global_grad_norm: float | None = None  # the name under which DeepSpeed's engine looks for it
        self._clip: float | None = None
        self._orthogonalise_dtype = orthogonalise_dtype
        self._pieces: dict[Tensor, MatrixPieces] = {}

    def attach_pieces(self, pieces: dict[Tensor, MatrixPieces]) -> None:
        """Tells how matrices lie in each flat Muon partition. Raises RuntimeError when one of them would go missing."""
        found = sum(len(layout.matrices) for layout in pieces.values())
        if found != self.muon_tensors:
            raise RuntimeError(f"Muon was given {self.muon_tensors} matrices, but the partitions hold {found}.")
        self._pieces = pieces

    def guard_gradients(self, clip: float) -> None:
        """From now on `step` itself measures the global norm, skips a non-finite one, and clips to `clip` (0: does not)."""
        self._clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Collective where Muon's matrices are cut across ranks."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure.")
        if self._clip is not None and not self._admit_gradients(self._clip):
            return
        for group in self.param_groups:  # DeepSpeed empties the groups whose turn it is not
            live = [p for p in group["params"] if p.grad is not None]
            if not live:
                continue
            self.make_state(live, group)
            if group["update"] == MUON:
                self._muon_step(live, group)
            elif group["update"] == SIGN:
                sign_step(live, group["lr"], group["weight_decay"])
            else:
                self._adamw_step(live, group)
            if self.ema is not None:
                torch._foreach_lerp_([self.state[p]["ema"] for p in live], live, 1 - self.ema)

    def _admit_gradients(self, clip: float) -> bool:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = math.inf if self.overflow else float(norm)
        if clip > 0 and not self.overflow:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return not self.overflow

    def make_state(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The first state of those of a group's parameters that have none."""
        for p in parameters:
            state = self.state[p]
            if state:
                continue
            if group["update"] == MUON:
                state["momentum_buffer"] = torch.zeros_like(p)
            elif group["update"] == ADAMW:
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            if self.ema is not None:
                state["ema"] = p.detach().clone()

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"] or None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        mixes = [momentum_mix(p.grad, self.state[p]["momentum_buffer"], group["muon_momentum"]) for p in parameters if p.grad is not None]
        for p, update in zip(parameters, self._muon_updates(parameters, mixes, group["muon_steps"]), strict=True):
            apply_update(p, update, group["lr"], group["weight_decay"])

    def _muon_updates(self, parameters: list[Tensor], mixes: list[Tensor], steps: int) -> list[Tensor]:
        dtype = self._orthogonalise_dtype or (torch.float32 if parameters[0].device.type == "cpu" else torch.bfloat16)
        if all(p in self._pieces for p in parameters):
            return [self._pieces[p].update(mix, steps, dtype) for p, mix in zip(parameters, mixes, strict=True)]
        if any(p.ndim != 2 for p in parameters):
            raise RuntimeError("Muon was handed something that is no matrix: call zero.attach after deepspeed.initialize.")
        return orthogonalised(mixes, steps, dtype)


@torch.no_grad()
def sign_step(parameters: list[Tensor], lr: float, weight_decay: float) -> None:
    """p <- p (1 - lr decay [g != 0]) - lr sign(g), by element.

    The published optimizer adds up the gradients of each puzzle's own row and steps the rows that occur in the batch. A row that does not
    occur has gradient 0 here and stays as it is, so the two agree but for an element of a row in use whose gradient is exactly 0, which
    the published one decays. By element, so a flat partition with its padding of zeros is stepped right.
    """
    for p in parameters:
        assert p.grad is not None
        sign = p.grad.sign()
        p.addcmul_(p, sign.abs(), value=-lr * weight_decay).add_(sign, alpha=-lr)


def build_optimizer(model: nn.Module, roles: Mapping[str, Role], settings: OptimizerSection, *, fused: bool = False) -> MuonAdamW:
    """The optimizer of a recipe's `optimizer` section, over the model's own parameters: give it to `deepspeed.initialize`."""
    return MuonAdamW(parameter_groups(model, roles, settings), ema=settings.ema, fused=fused)


def build_puzzle_optimizer(
    model: nn.Module, roles: Mapping[str, Role], settings: PuzzleOptimizerSection, *, fused: bool = False
) -> MuonAdamW:
    """That of a puzzle recipe's `optimizer` section, likewise; `roles` is of model.reasoning.roles."""
    return MuonAdamW(puzzle_groups(model, roles, settings), ema=settings.ema, fused=fused)


def apply_schedule(optimizer: torch.optim.Optimizer, tokens_done: int, schedule: ScheduleSection, total_tokens: int) -> float:
    """Sets every group's learning rate, and Muon's weight decay, for the step that starts at `tokens_done`; returns the scale."""
    scale = learning_rate_scale(tokens_done, schedule, total_tokens)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
        if group["update"] == MUON:
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_scale(tokens_done, total_tokens)
    return scale
