"""Exports: what was trained is what transformers computes without our code; what is refused, and that nothing is left then."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data_pipeline.tokenizer import BEGIN
from model.language_model import LanguageModel
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.hub import export
from pretrain.hub.export import export_run
from pretrain.hub.export_tokenizer import PROMPT
from pretrain.loaded import load_model, load_run
from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import SETTINGS
from tests.pretrain.untrained_runs import write_untrained_run

TEXT = "Document 3 says"
ALONE = f"""
import json, sys
for name in ("model", "pretrain", "data_pipeline", "launchers", "deepspeed"):
    sys.modules[name] = None  # importing any of them now raises
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
found = {{"ids": tokenizer({TEXT!r})["input_ids"], "forged": tokenizer("{BEGIN}")["input_ids"]}}
ids = torch.tensor([found["ids"]])
for depth in (0, 1, "auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, solver_iterations=depth, solver_tolerance=1e-6)
    with torch.no_grad():
        found[str(depth)] = model(ids).logits.tolist()
batch = tokenizer([{TEXT!r}, "And", "little else is said of it"], return_tensors="pt", padding=True)
options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
found["generated"] = model.generate(**batch, **options).tolist()
found["uncached"] = model.generate(**batch, use_cache=False, **options).tolist()
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
with torch.no_grad():
    found["again"] = again(ids).logits.tolist()
found["read"] = [again.config.solver_iterations, again.config.solver_tolerance]
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _no_cache_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modelling files are copied to a folder of the tests before they are imported."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the tiny run, with an average of its weights."""
    run = tmp_path_factory.mktemp("trained") / "run"
    changes = [*SETTINGS, f"data.path={data}", f"run.dir={run}", "solver.tolerance=1e-4"]
    (ended,) = run_ranks("tests.pretrain.trainer_ranks:runs", 1, [{"overrides": changes}])
    assert ended[0]["code"] == 0, ended[0]["message"]
    return run


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_run(trained, out)
    return out


def logits(model: LanguageModel, ids: list[int], depth: int | str) -> torch.Tensor:
    return model.logits(torch.tensor([ids]), depth=depth)


def test_a_trained_run_is_what_transformers_loads_without_our_code(trained: Path, exported: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "saved")], capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = load_run(trained)
    assert loaded.which == "average.safetensors"
    ids = [loaded.begin_id, *loaded.tokenizer().encode(TEXT, add_special_tokens=False).ids]
    assert found["ids"] == ids
    assert found["forged"].count(loaded.begin_id) == 1  # the one that begins the text
    refine: Any = loaded.model.refine
    for depth in ("0", "1", "auto"):
        object.__setattr__(refine.solver, "tolerance", 1e-6)
        wanted = logits(loaded.model, ids, "strict" if depth == "auto" else int(depth))
        assert (torch.tensor(found[depth]) - wanted).abs().max() < 1e-4
    assert found["generated"] == found["uncached"]
    assert found["again"] == found["auto"]
    assert found["read"] == ["auto", 1e-6]


def test_an_export_is_loaded_here_as_the_run_it_was(trained: Path, exported: Path) -> None:
    run, back = load_run(trained), load_model(exported)
    assert back.architecture.model == run.architecture.model
    assert (back.begin_id, back.sequence_length) == (run.begin_id, run.sequence_length)
    assert back.tokenizer().encode(TEXT, add_special_tokens=False).ids == run.tokenizer().encode(TEXT, add_special_tokens=False).ids
    for (name, ours), theirs in zip(run.model.named_parameters(), back.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_folder_tells_where_the_model_comes_from(trained: Path, exported: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    origin = json.loads((exported / "attractor.json").read_text())
    assert (origin["step"], origin["tokens"], origin["flops"]) == (20, summary["tokens"], summary["flops"]["total"])
    assert origin["recipe"]["optimizer"]["ema"] == 0.9
    assert set(origin["sha256"]) == {path.name for path in exported.iterdir()} - {"attractor.json"}
    card = (exported / "README.md").read_text()
    loss = summary["evaluation"]["loss"]
    for told in (f"{summary['tokens']:,}", f"{loss['0']:.4f}", f"{loss['auto']:.4f}", "moving average", "trust_remote_code", BEGIN):
        assert told in card
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["bos_token_id"] == generation["eos_token_id"] == generation["pad_token_id"] == load_run(trained).begin_id
    assert generation["suppress_tokens"] == list(range(300, 320)), "rows of the embedding that are no token"


@pytest.mark.parametrize(
    ("overrides", "stock"),
    [
        (["model.kind=transformer", "model.qk_norm=false", "model.mlp=swiglu"], "Llama"),
        (["model.kind=transformer", "model.mlp=swiglu", "model.kv_heads=1", "model.tied_embeddings=false"], "Qwen3"),
        (["model.kind=transformer", "model.qk_norm=false"], "Arcee"),
        (["model.kind=transformer"], "Apertus"),
        (["model.kind=attractor", "model.norm_eps=1e-6"], "Apertus"),
    ],
)
def test_code_free_exports_are_stock_models(data: Path, tmp_path: Path, overrides: list[str], stock: str) -> None:
    import transformers

    run = write_untrained_run(tmp_path / "run", data, *overrides)
    result = export_run(run, tmp_path / "out", plain=True, solver_iterations=0)
    assert result["class"] == f"{stock}ForCausalLM"
    assert not list((tmp_path / "out").glob("*.py"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == f"{stock}ForCausalLM"
    loaded = load_run(run)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPT)["input_ids"]
    with torch.no_grad():
        wanted, found = logits(loaded.model, ids, 0), model(torch.tensor([ids])).logits
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("not the whole model" in card) == (loaded.architecture.model.kind == "attractor")
    with pytest.raises(Refusal, match="code-free export"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "depth", "said"),
    [
        (["model.kind=attractor"], "auto", "only the proposal fits"),
        (["model.kind=deq"], 0, "an equilibrium"),
        (["model.kind=parcae", "loop.core=1", "loop.coda=0"], 0, "a loop"),
        (["model.kind=transformer", "model.value_embeddings=true", "model.value_gate_channels=8"], 0, "value embeddings"),
    ],
)
def test_nothing_stock_fits_these(data: Path, tmp_path: Path, overrides: list[str], depth: int | str, said: str) -> None:
    run = write_untrained_run(tmp_path / "run", data, *overrides)
    with pytest.raises(Refusal, match=said):
        export_run(run, tmp_path / "out", plain=True, solver_iterations=depth)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overrides", [["model.kind=parcae", "loop.core=1", "loop.coda=0"], ["model.kind=deq", "train.precision=bf16"]])
def test_other_kinds_come_back_as_they_were(data: Path, tmp_path: Path, overrides: list[str]) -> None:
    run = write_untrained_run(tmp_path / "run", data, *overrides)
    export_run(run, tmp_path / "out", solver_iterations=2)
    ours, back = load_run(run), load_model(tmp_path / "out")
    assert getattr(back, "solver_iterations", None) == 2
    assert next(back.model.parameters()).dtype == next(ours.model.parameters()).dtype
    assert torch.equal(logits(ours.model, [0, 5, 9, 7], 2), logits(back.model, [0, 5, 9, 7], 2))


def test_a_map_that_does_not_contract_is_compared_while_rounding_is_small(data: Path, tmp_path: Path) -> None:
    run = write_untrained_run(tmp_path / "run", data, "attractor.injection=init_only", "solver.patience=64")
    assert list(export_run(run, tmp_path / "out")["logit_difference"]) == ["0", "1", "4 of auto"]


def test_a_model_that_is_not_the_trained_one_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.hub import modeling_attractor

    monkeypatch.setattr(modeling_attractor, "normalised", lambda x, eps: x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1.0))
    with pytest.raises(Refusal, match="not the trained one: at 0 solver iterations"):
        export_run(trained, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_tensors_changed_on_the_disk_are_found_and_nothing_is_left(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = export.write_tensors

    def spoil(folder: Path, *arguments: Any, **options: Any) -> list[Path]:
        files = written(folder, *arguments, **options)
        content = bytearray(files[0].read_bytes())
        content[-1] ^= 1
        files[0].write_bytes(content)
        return files

    monkeypatch.setattr(export, "write_tensors", spoil)
    with pytest.raises(Refusal, match="came back from the disk changed"):
        export_run(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", refuse)
    with pytest.raises(RunStopped, match="No space left on device") as stopped:
        export_run(trained, tmp_path / "out")
    assert stopped.value.code == BAD_CHECKPOINT_WRITE
    assert list(tmp_path.iterdir()) == []


def test_targets_and_runs_that_do_not_do(trained: Path, exported: Path, tmp_path: Path) -> None:
    before = sorted(exported.iterdir())
    with pytest.raises(Refusal, match="already exists"):
        export_run(trained, exported)
    assert sorted(exported.iterdir()) == before
    with pytest.raises(Refusal, match="no run"):
        export_run(tmp_path, tmp_path / "out")
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(Refusal, match="no checkpoint"):
        export_run(copy, tmp_path / "out")


def test_checkpoints_and_tokenizers_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    run = write_untrained_run(tmp_path / "run", data)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save(str(run / "tokenizer.json"))
    with pytest.raises(Refusal, match="not this model's tokenizer"):
        export_run(run, tmp_path / "out")
    (run / "tokenizer.json").unlink()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("backbone_layers: 2", "backbone_layers: 1"))
    with pytest.raises(Refusal, match=r"unknown tensor: backbone\.blocks\.1"):
        export_run(run, tmp_path / "out")
    (run / "config.yaml").write_text(config.replace("backbone_layers: 2", "backbone_layers: 3"))
    with pytest.raises(Refusal, match=r"lacks backbone\.blocks\.2"):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- exports that come from elsewhere


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def change(folder: Path, **values: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    for dotted, value in values.items():
        section, _, key = dotted.partition("__")
        if key:
            document[section][key] = value
        else:
            document[section] = value
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "llama"}, "type 'llama'"),
        ({"secret": 1}, "'secret', which no export has"),
        ({"solver__tolerence": 1e-3}, r"solver\.tolerence, which does not exist"),
        ({"model__width": "wide"}, r"model\.width"),
        ({"model__heads": 5}, r"model\.heads=5"),
        ({"hidden_size": 7}, "hidden_size is 7"),
        ({"solver_iterations": "deep"}, "solver_iterations"),
        ({"solver_tolerance": -1}, r"solver\.tolerance must be above 0"),
        ({"solver_tolerance": "fine"}, "solver_tolerance"),
        ({"solver_tolerance": 10**400}, "describes no model"),
        ({"attractor__layers": 10**6}, "the model that its configuration describes has"),
        ({"loop": None}, "no section 'loop'"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_configurations_no_export_has(copy: Path, values: dict[str, Any], said: str) -> None:
    change(copy, **values)
    with pytest.raises(Refusal, match=said):
        load_model(copy)


def test_weights_no_export_has(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(Refusal, match="cut short or damaged"):
        load_model(copy)
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, file)
    with pytest.raises(Refusal, match=r"unknown tensor: extra\.weight"):
        load_model(copy)
    file.rename(copy / "model-00001-of-00002.safetensors")
    index = copy / "model.safetensors.index.json"
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": names | {"norm.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(Refusal, match=r"missing|disagree"):
        load_model(copy)
    index.write_text(json.dumps({"weight_map": names | {"norm.weight": "../model.safetensors"}}))
    with pytest.raises(Refusal, match="not a plain name"):
        load_model(copy)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_pickles_are_never_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    for name in ("pytorch_model.bin", "model.pt"):
        (copy / name).write_bytes(pickle.dumps(_Bomb()))
    load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="no weights"):
        load_model(copy)
    assert not (copy / "exploded").exists()
