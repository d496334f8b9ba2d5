"""Published weights come in with the numbers they had, whatever their configuration; and leave again with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.noise import normal
from pretrain.hub.export import export_run, load_export
from pretrain.hub.published import import_run
from pretrain.loaded import load_run
from tests.pretrain.hub.published_models import BLOCK, ROWS, WIDTH, configuration, random_state, reference, write_model

ROOT = Path(__file__).resolve().parents[3]
TOKENS = torch.randint(0, ROWS, (2, BLOCK), generator=torch.Generator().manual_seed(7))
UNTIED = {"tie_embeddings": False}
GROUPED = {"num_key_value_heads": 2}
GATED = {"mlp_class_name": "GatedMLP", "nonlin_name": "SiLU"}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attractor of two blocks": ("attractor", {}),
    "attractor of one block, another ceiling": ("attractor", {"n_fp_blocks": 1, "gamma_max": 0.9}),
    "EQLM": ("attractor", {"_class_name": "EQLMConfig", "model_class_name": "EQLM"}),
    "scaled embedding and logits": ("attractor", {"init_strategy": "takase-scaled"}),
    "scaled, with a head of its own": ("attractor", {"init_strategy": "takase-scaled", **UNTIED}),
    "a head stored transposed": ("attractor", {"use_fused_head": "full-triton", **UNTIED}),
    "grouped queries, gated MLP, no QK norm": ("attractor", {**GROUPED, **GATED, "qk_norm": False}),
    "another base and epsilon": (
        "attractor",
        {"rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 10000}, "norm_eps": 1e-3},
    ),
    "gpt": ("gpt", {}),
    "gpt, grouped queries": ("gpt", GROUPED),
    "gpt, head of its own": ("gpt", UNTIED),
    "parcae": ("parcae", {}),
}


def imported(source: Path, out: Path, **options: Any) -> LanguageModel:
    import_run(source, out, **options)
    return load_run(out, device=torch.device("cpu"), dtype=torch.float32).model


def start_of(tokens: Tensor) -> Tensor:
    """The state that Parcae's loop starts from in evaluation."""
    with torch.no_grad():
        return normal([0] * len(tokens), tokens.shape[1], WIDTH, (2 / (5 * WIDTH)) ** 0.5, torch.empty(0))


def worst(model: LanguageModel, config: dict[str, Any], state: dict[str, Tensor], iterations: int, depth: int | str | None = None) -> float:
    """Largest difference of a logit from the reference's, over the deviation of those."""
    start = start_of(TOKENS) if config["_class_name"] == "ParcaeConfig" else None
    wanted = reference(config, state, TOKENS, iterations, start)
    found = model.logits(TOKENS, depth=iterations if depth is None else depth)
    return ((found - wanted).abs().max() / wanted.std()).item()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_the_published_ones(tmp_path: Path, name: str) -> None:
    kind, changes = CONFIGURATIONS[name]
    config = configuration(kind, **changes)
    state = random_state(config)
    model = imported(write_model(tmp_path / "theirs", config, state), tmp_path / "run")
    for iterations in (0,) if kind == "gpt" else (0, 1, 8):
        assert worst(model, config, state, iterations) < 5e-5, iterations


def test_anderson_finds_the_published_equilibrium(tmp_path: Path) -> None:
    config = configuration("attractor", solver="anderson", tol=1e-6)
    state = random_state(config)
    model = imported(write_model(tmp_path / "theirs", config, state), tmp_path / "run")
    assert model.config.solver.method == "anderson"
    for depth in ("auto", "strict"):
        assert worst(model, config, state, 200, depth) < 1e-4


def test_what_the_configuration_says_of_solver_and_gradient_is_in_the_recipe(tmp_path: Path) -> None:
    changes = {
        "solver": "anderson",
        "anderson_beta": 0.96,
        "backward_type": "anderson",
        "adjoint_grad_clip": 2.0,
        "max_iter": 32,
        "tol": 1e-3,
    }
    config = configuration("attractor", **changes)
    import_run(write_model(tmp_path / "theirs", config, random_state(config)), tmp_path / "run")
    recipe = load_run(tmp_path / "run").recipe
    assert (recipe.solver.damping, recipe.solver.tolerance, recipe.solver.max_iterations, recipe.solver.min_iterations) == (
        0.96,
        1e-3,
        32,
        2,
    )
    assert (recipe.gradient.mode, recipe.gradient.clip, recipe.gradient.tolerance) == ("adjoint", 2.0, 1e-6)
    assert (recipe.attractor.gate_initial, recipe.attractor.gate_maximum) == (0.5, 0.75)
    assert (recipe.optimizer.attractor_lr_scale, recipe.optimizer.attractor_weight_decay) == (0.5, 0.1)
    assert (recipe.data.sequence_length, recipe.run.dir) == (BLOCK, str(tmp_path / "run"))


def test_the_stored_table_decides_over_a_base_that_the_public_tools_dropped(tmp_path: Path) -> None:
    config = configuration("attractor")
    state = random_state(configuration("attractor", rope_settings={"use_rope": True, "rope_condense_ratio": 1, "rope_base": 10000}))
    model = imported(write_model(tmp_path / "theirs", config, state), tmp_path / "run")
    assert model.config.model.rope_base == 10000
    assert worst(model, config, state, 1) < 5e-5


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "_forward_module.model."])
def test_every_file_and_prefix(tmp_path: Path, file: str, prefix: str) -> None:
    config = configuration("attractor")
    state = random_state(config)
    named = {prefix + name: tensor.clone() for name, tensor in state.items()}
    source = write_model(tmp_path / "theirs", config, named, "pytorch_model.bin")
    if file == "model.safetensors":
        from safetensors.torch import save_file

        (source / "pytorch_model.bin").unlink()
        save_file(named, source / file)
    assert worst(imported(source, tmp_path / "run"), config, state, 1) < 5e-5


def test_half_precision_and_a_missing_table_and_a_missing_tied_head(tmp_path: Path) -> None:
    config = configuration("attractor")
    state = {name: tensor.bfloat16() for name, tensor in random_state(config).items()}
    model = imported(write_model(tmp_path / "rounded", config, state), tmp_path / "run")
    wide = {name: tensor.float() for name, tensor in state.items()} | {"freqs_cis": random_state(config)["freqs_cis"]}
    assert worst(model, config, wide, 1) < 5e-5
    del state["freqs_cis"], state["lm_head.weight"]
    assert worst(imported(write_model(tmp_path / "bare", config, state), tmp_path / "again"), config, wide, 1) < 5e-5


class Scheduler:
    """Stands for an object of the public training code inside a checkpoint."""

    def __init__(self) -> None:
        self.step = 3


def write_training_run(folder: Path, config: dict[str, Any], state: dict[str, Tensor], **besides: Any) -> Path:
    """A run folder as the public train.py leaves it: the configuration names no _class_name, one checkpoint holds everything."""
    (folder / "checkpoints-DDPStrategy").mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "_class_name"}))
    named = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    momentum = {"state": {0: {"exp_avg": torch.zeros(3), "step": 5}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    whole = {
        "model": named,
        "optimizer": momentum,
        "microbatch_step": 7,
        "model_config": config,
        "rng_state_torch": torch.get_rng_state(),
        **besides,
    }
    torch.save(whole, folder / "checkpoints-DDPStrategy" / "last-tiny")
    return folder


@pytest.mark.parametrize("kind", ["attractor", "gpt", "parcae"])
def test_a_training_run_with_objects_of_its_own_code(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import random
    import sys
    import types

    import numpy as np

    config = configuration(kind)
    state = random_state(config)
    module = types.ModuleType("recpre.schedulers")
    monkeypatch.setitem(sys.modules, "recpre", types.ModuleType("recpre"))
    monkeypatch.setitem(sys.modules, "recpre.schedulers", module)
    monkeypatch.setattr(Scheduler, "__module__", "recpre.schedulers")
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    besides = {
        "lr_scheduler": Scheduler(),
        "tokenizer": {"dir": Path("/somewhere")},
        "rng_state_numpy": np.random.get_state(),
        "rng_state_python": random.getstate(),
        "val_dataloader": torch.utils.data.DataLoader([1, 2]),
    }
    source = write_training_run(tmp_path / "theirs", config, state, **besides)
    monkeypatch.setattr(Scheduler, "__setstate__", lambda *_: pytest.fail("its code ran"), raising=False)
    model = imported(source, tmp_path / "run")
    assert worst(model, config, state, 0 if kind == "gpt" else 2) < 5e-5
    again = imported(source / "checkpoints-DDPStrategy" / "last-tiny", tmp_path / "again")
    assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), again.parameters(), strict=True))


def test_the_run_says_where_it_came_from(tmp_path: Path) -> None:
    import hashlib

    config = configuration("gpt")
    source = write_model(tmp_path / "theirs", config, random_state(config))
    report = import_run(source, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert (kept["config"], kept["source"]) == (config, str(source))
    assert kept["sha256"]["model.pt"] == hashlib.sha256((source / "model.pt").read_bytes()).hexdigest()
    assert report["parameters"] == sum(part.numel() for part in load_run(tmp_path / "run").model.parameters())
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "run"}


def test_memory_is_a_shard_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pretrain.hub.published as published

    config = configuration("gpt")
    source = write_model(tmp_path / "theirs", config, random_state(config))
    held: list[Tensor] = []
    original = published.write_canonical

    def watched(folder: Path, step: int, state: Any, sources: Any, progress: Any) -> Path:
        shapes, read = sources["weights"]

        def one(name: str) -> Tensor:
            held.append(read(name))
            return held[-1]

        return original(folder, step, state, {"weights": type(sources["weights"])(shapes, one)}, progress)

    monkeypatch.setattr(published, "write_canonical", watched)
    import_run(source, tmp_path / "run")
    assert len(held) == len(list(load_run(tmp_path / "run").model.parameters()))  # each asked for once, when it is written


def test_published_to_run_to_export_and_back(tmp_path: Path, data: Path) -> None:
    config = configuration("attractor", vocab_size=300, padded_vocab_size=320)
    state = random_state(config)
    model = imported(write_model(tmp_path / "theirs", config, state), tmp_path / "run", tokenizer=data / "tokenizer.json")
    export_run(tmp_path / "run", tmp_path / "export")
    exported = load_export(tmp_path / "export", device=torch.device("cpu"), dtype=torch.float32).model
    for iterations in (0, 1, 8):
        assert worst(exported, config, state, iterations) < 5e-5
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Imported from `theirs` and not trained since" in card
    assert "optimizer" not in card
    report = import_run(tmp_path / "export", tmp_path / "again")
    again = load_run(tmp_path / "again", device=torch.device("cpu"), dtype=torch.float32)
    assert report["tokenizer"]
    assert again.architecture == exported.config
    assert again.sequence_length == BLOCK
    assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), again.model.parameters(), strict=True))


def test_training_goes_on_from_an_import_with_a_fresh_optimizer(tmp_path: Path, data: Path) -> None:
    config = configuration("gpt", vocab_size=300, padded_vocab_size=320)
    import_run(write_model(tmp_path / "theirs", config, random_state(config)), tmp_path / "run", data=str(data))
    changes = ["train.tokens=64", "train.global_batch=4", "train.micro_batch=2", "train.precision=fp32", "optimizer.lr=1e-4"]
    before = load_run(tmp_path / "run", device=torch.device("cpu"), dtype=torch.float32)
    changes += ["evaluation.tokens=16", "train.log_every=1", "train.device=cpu"]
    words = ["train", str(tmp_path / "run" / "config.yaml"), *changes, "--resume"]
    ended = subprocess.run([sys.executable, "-m", "launchers", *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    after = load_run(tmp_path / "run", device=torch.device("cpu"), dtype=torch.float32)
    assert (before.step, after.step, first["step"]) == (0, 1, 1)
    moved = [(mine - its).abs().max() for mine, its in zip(before.model.parameters(), after.model.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1
