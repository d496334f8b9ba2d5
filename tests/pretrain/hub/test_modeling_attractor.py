"""The modelling file of an export against the training model: every kind of model, every depth, cached and padded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from model.config import AttractorConfig, BackboneConfig, LoopConfig, ModelConfig, SolverConfig
from model.language_model import LanguageModel, build
from pretrain.hub.modeling_attractor import DEFAULTS, AttractorForCausalLM
from pretrain.hub.modeling_attractor import AttractorConfig as ExportedConfig

BASE = ModelConfig(
    BackboneConfig(vocabulary_size=64, width=32, heads=4, backbone_layers=4),
    AttractorConfig(gate_initial=0.3),
    SolverConfig(tolerance=1e-5),
    loop=LoopConfig(core=1, coda=1, iterations=3, backprop=2),
)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "additive": {},
    "concat": {"attractor": {"injection": "concat"}},
    "init_only": {"attractor": {"injection": "init_only"}, "solver": {"max_iterations": 3}},  # does not contract: rounding grows
    "cross_attention": {"attractor": {"injection": "cross_attention", "layers": 2}},
    "from noise": {"solver": {"start": "noise", "history": 4, "damping": 0.7}, "model": {"qk_norm": False}},
    "picard from zero": {"solver": {"method": "picard", "start": "zero"}, "model": {"mlp_width": 48}},
    "everything": {
        "model": {"kv_heads": 2, "value_embeddings": True, "value_gate_channels": 8, "mlp": "swiglu", "tied_embeddings": False},
    },
    "transformer": {"model": {"kind": "transformer", "value_embeddings": True, "value_gate_channels": 8}},
    "parcae": {"model": {"kind": "parcae", "value_embeddings": True, "value_gate_channels": 8}},
    "looped": {"model": {"kind": "looped"}},
    "deq": {"model": {"kind": "deq"}},
    "deq without a backbone": {"model": {"kind": "deq", "backbone_layers": 0}},
}
ONE_OF_EACH = ["additive", "from noise", "everything", "transformer", "parcae", "looped", "deq"]
DEPTHS: list[int | str] = [0, 1, 3, "auto"]


def pair(variant: str, **solver: Any) -> tuple[LanguageModel, AttractorForCausalLM]:
    """The training model with all its weights random, and the exported one with the same."""
    changes = VARIANTS[variant]
    config = replace(BASE, **{name: replace(getattr(BASE, name), **fields) for name, fields in changes.items()})
    config = replace(config, solver=replace(config.solver, **solver))
    model = build(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    exported = AttractorForCausalLM(ExportedConfig(**{name: asdict(getattr(config, name)) for name in DEFAULTS}))
    exported.load_state_dict(model.state_dict())
    return model, exported.eval()


def tokens(batch: int = 3, length: int = 20) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(0))


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_training_models_at_every_depth(variant: str) -> None:
    model, exported = pair(variant)
    for depth in DEPTHS:
        wanted = model.logits(tokens(), depth="strict" if depth == "auto" else depth)
        assert wanted.abs().max() > 1 or depth == 0, "a model that says nothing agrees with everything"
        assert difference(exported(tokens(), solver_iterations=depth).logits, wanted) < 1e-5, depth


@torch.no_grad()
def test_tokens_that_cannot_reach_the_tolerance_stop_as_in_training() -> None:
    model, exported = pair("additive", tolerance=1e-12)
    found = exported(tokens()).logits
    assert exported.last_iterations is not None
    assert exported.last_iterations.max() < BASE.solver.max_iterations
    assert difference(found, model.logits(tokens(), depth="strict")) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_cache_gives_what_the_full_computation_gives(variant: str) -> None:
    _, exported = pair(variant)
    for depth in DEPTHS:
        full = exported(tokens(), solver_iterations=depth, use_cache=False)
        assert full.past_key_values is None
        cache, parts = None, []
        for start, stop in ((0, 7), (7, 10), *((at, at + 1) for at in range(10, 20))):
            step = exported(tokens()[:, start:stop], solver_iterations=depth, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
        assert difference(torch.cat(parts, dim=1), full.logits) < (1e-4 if depth == "auto" else 1e-5), depth


@torch.no_grad()
@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_padding_changes_nothing(variant: str) -> None:
    _, exported = pair(variant)
    lengths, width = (11, 4, 7), 11
    for left in (True, False):
        batch, mask = torch.full((3, width), 9), torch.zeros(3, width, dtype=torch.int64)
        for row, length in enumerate(lengths):
            where = slice(width - length, None) if left else slice(length)
            batch[row, where], mask[row, where] = tokens()[row, :length], 1
        together = exported(batch, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = exported(tokens()[row : row + 1, :length]).logits[0]
            assert difference(together[row][mask[row].bool()], alone) < 1e-5


@pytest.mark.parametrize("variant", ["additive", "parcae", "deq"])
def test_generation_with_a_cache_in_a_padded_batch_is_that_of_each_prompt_alone(variant: str) -> None:
    _, exported = pair(variant, tolerance=1e-6)
    batch, mask = tokens(3, 8).clone(), torch.ones(3, 8, dtype=torch.int64)
    mask[1, :5], mask[2, :2] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = exported.generate(batch, attention_mask=mask, **options)
    assert torch.equal(cached, exported.generate(batch, attention_mask=mask, use_cache=False, **options))
    for row, start in enumerate((0, 5, 2)):
        prompt = batch[row : row + 1, start:]
        alone = exported.generate(prompt, attention_mask=torch.ones_like(prompt), solver_iterations="auto", **options)
        assert torch.equal(alone[0, -6:], cached[row, -6:])


def test_a_loss_teaches_every_parameter_with_the_one_step_gradient() -> None:
    model, exported = pair("everything", tolerance=1e-7)
    out = exported(tokens(), labels=tokens())
    out.loss.backward()
    assert out.past_key_values is None
    targets = torch.cat((tokens()[:, 1:], torch.full((3, 1), -100)), dim=1)
    loss, _ = model(tokens(), targets)
    loss.backward()
    assert difference(out.loss, loss) < 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert difference(exported.get_parameter(name).grad, parameter.grad) < 1e-4 * max(1, float(parameter.grad.abs().max())), name


@torch.no_grad()
def test_iterations_are_told_token_by_token_and_fixed_counts_are_exact() -> None:
    _, exported = pair("additive")
    exported(tokens(), solver_iterations=2)
    assert exported.last_iterations.unique().tolist() == [2]
    exported(tokens(), solver_iterations=0)
    assert exported.last_iterations.unique().tolist() == [0]
    exported(tokens())
    taken = exported.last_iterations
    assert taken.min() > 2
    assert torch.equal(taken, taken.cummax(dim=1).values)  # no token is done before those it reads


@torch.no_grad()
def test_in_bf16_the_state_stays_wide_and_the_solve_ends() -> None:
    _, exported = pair("additive")
    exact = exported(tokens()).logits
    rounded = exported.to(torch.bfloat16)(tokens())
    assert rounded.logits.dtype == torch.bfloat16
    assert exported.last_iterations.max() < BASE.solver.max_iterations
    assert float((rounded.logits.float() - exact).norm() / exact.norm()) < 0.05


def test_the_sections_are_those_of_training() -> None:
    assert {name: asdict(getattr(ModelConfig(), name)) for name in DEFAULTS} == DEFAULTS


def test_what_it_cannot_do_is_said() -> None:
    _, exported = pair("additive")
    for wrong in (-1, "deep", 1.5, True):
        with pytest.raises(ValueError, match="neither 'auto' nor a number"):
            exported(tokens(), solver_iterations=wrong)
    with pytest.raises(ValueError, match="no key of the section 'solver'"):
        ExportedConfig(solver={"tolerence": 1e-3})
    with pytest.raises(ValueError, match="hidden_size=99 contradicts"):
        ExportedConfig(model={"vocabulary_size": 64}, hidden_size=99)
    with pytest.raises(ValueError, match="attention_mask must be"):
        exported(tokens(), attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="needs input_ids"):
        exported(inputs_embeds=torch.zeros(1, 4, 32))
    grown = exported(tokens(), use_cache=True, solver_iterations=2).past_key_values
    with pytest.raises(ValueError, match="filled at solver_iterations=2: at 'auto' begin a new one"):
        exported(tokens(3, 1), past_key_values=grown)
    with pytest.raises(ValueError, match="cannot be resized"):
        pair("everything")[1].resize_token_embeddings(70)


def test_a_vocabulary_grown_by_transformers_is_told_everywhere() -> None:
    _, exported = pair("additive")
    exported.resize_token_embeddings(70)
    again = ExportedConfig(**exported.config.to_dict())
    assert again.vocab_size == again.model["vocabulary_size"] == exported(tokens() + 6).logits.shape[-1] == 70


def test_the_trainer_of_transformers_teaches_and_evaluates_it(tmp_path: Path) -> None:
    _, exported = pair("additive")
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no", "use_cpu": True}
    trainer = Trainer(exported, TrainingArguments(str(tmp_path), report_to=[], **options), train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@torch.no_grad()
def test_in_bf16_the_solve_ends_where_the_training_model_ends() -> None:
    model, exported = pair("additive", tolerance=1e-3)
    rounded, text = exported.bfloat16(), tokens(2, 120)
    rounded(text)
    wanted = model.bfloat16()
    proposal, context = wanted.propose(text, None)
    solution = wanted.refine(proposal, context, "strict").solution  # type: ignore[misc, union-attr]
    taken = rounded.last_iterations.amax(dim=1)
    assert 1 < taken.max() < 40 < model.config.solver.max_iterations, "rounding alone must not use up all evaluations"
    assert (taken - solution.iterations).abs().max() <= 6  # the two round differently


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 4])
def test_a_recipe_of_a_fixed_count_is_that_count(count: int) -> None:
    _, exported = pair("additive", min_iterations=count, max_iterations=count)
    text = tokens(2, 12)
    whole = exported(text).logits
    assert difference(whole, exported(text, solver_iterations=count).logits) == 0
    first = exported(text[:, :7], use_cache=True)
    rest = exported(text[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert difference(rest.logits, whole[:, 7:]) < 1e-5
