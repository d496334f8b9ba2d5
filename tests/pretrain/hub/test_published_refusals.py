"""What is no whole published model is refused in one paragraph, none of it runs, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline import open_manifest
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.hub.published import import_run
from tests.pretrain.hub.published_models import ROWS, configuration, random_state, write_model

State = dict[str, Tensor]


def refusal(source: Path, **options: Any) -> str:
    """What an import says that must be refused, once it is seen to have left nothing."""
    before = {path for path in source.parent.iterdir()}
    with pytest.raises(Refusal) as caught:
        import_run(source, source.parent / "run", **options)
    assert {path for path in source.parent.iterdir()} == before
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model, its configuration and its tensors changed."""

    def write(change: Callable[[State], Any] = lambda _: None, kind: str = "attractor", file: str = "model.pt", **changes: Any) -> Path:
        config = configuration(kind)
        state = random_state(config)
        change(state)
        return write_model(tmp_path / "theirs", {**config, **changes}, state, file)

    return write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logit_softcap": 15.0}, "logit_softcap=15.0, which the models here lack"),
        ({"causal": False}, "causal=False"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm'"),
        ({"bias": True}, "bias=True"),
        ({"clip_qkv": 8}, "clip_qkv=8"),
        ({"randomize_positions_from": 4096}, "randomize_positions_from=4096"),
        ({"mup_model_scaling_factor": 2}, "mup_model_scaling_factor=2"),
        ({"rope_settings": {"use_rope": True, "rope_condense_ratio": 2, "rope_base": 50000}}, "rope_condense_ratio=2"),
        ({"rope_settings": {"use_rope": False}}, "use_rope=False"),
        ({"nonlin_name": "GELU"}, "nonlin_name='GELU'"),
        ({"layer_scale_init": None}, "without gates"),
        ({"init_strategy": "mine"}, "init_strategy='mine'"),
        ({"solver": "broyden"}, "solver='broyden'"),
        ({"backward_type": "bptt"}, "backward_type='bptt'"),
        ({"post_norm": True}, "the option 'post_norm'"),
        ({"n_embd": "64"}, "n_embd='64', where a whole number belongs"),
        ({"tol": float("inf")}, "tol=inf"),
        ({"n_embd": 66}, "model.width=66"),
        ({"n_embd": 10**12}, "its configuration describes has 16,000,"),
        ({"n_fp_blocks": 10**6}, "hold 128,192 numbers"),
        ({"_class_name": "LlamaConfig"}, "the class 'LlamaConfig'"),
    ],
)
def test_options_that_would_change_numbers(model: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    assert said in refusal(model(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"injection_type": "linear"}, "injection_type='linear'"),
        ({"prelude_norm": False}, "prelude_norm=False"),
        ({"state_init": "zero"}, "state_init='zero'"),
        ({"recurrent_embedding_dimension": 32}, "recurrent_embedding_dimension=32"),
        ({"recurrent_intermediation_embedding_dimension": 32}, "recurrent_intermediation_embedding_dimension=32"),
        ({"recurrent_num_attention_heads": 2}, "recurrent_num_attention_heads=2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"init_strategy": "megatron"}, "noise of another size"),
        (
            {"n_layers_in_recurrent_block": 1, "mean_backprop_depth": 4},
            "value embeddings for the blocks [0, 2] and gates for them in the blocks",
        ),
    ],
)
def test_options_of_parcae(model: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    assert said in refusal(model(kind="parcae", **changes))


def test_a_gpt_whose_logits_are_scaled_in_its_loss_alone(model: Callable[..., Path]) -> None:
    assert "scales its logits in the loss" in refusal(model(kind="gpt", init_strategy="takase-scaled"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update({"transformer.wpe.weight": torch.zeros(2, 2)}), "uses: transformer.wpe.weight."),
        (lambda state: state.pop("transformer.prelude.1.mlp.fc.weight"), "lacks transformer.prelude.1.mlp.fc.weight."),
        (lambda state: [state.pop(f"transformer.core_block.1.{name}") for name in ("raw_gamma_mlp", "raw_gamma_attn")], "and 1 more"),
        (lambda state: state.update({"transformer.ln_f.weight": torch.zeros(65)}), "in the shape (65,)"),
        (
            lambda state: state.update({"transformer.prelude.0.attn.c_q.weight": torch.zeros(63, 64)}),
            "attn.c_q.weight in the shape (63, 64)",
        ),
        (lambda state: state.update({"transformer.ln_f.weight": torch.zeros(64, dtype=torch.int64)}), "torch.int64"),
        (lambda state: state.update({"lm_head.weight": state["lm_head.weight"] + 1}), "lm_head.weight that differs from"),
        (lambda state: state.update({"freqs_cis": state["freqs_cis"][:, :, :, :4]}), "freqs_cis in the shape"),
        (lambda state: state.update({"freqs_cis": state["freqs_cis"][:, ::2]}), "positions may be condensed"),
        (lambda state: state.update({"module.transformer.ln_f.weight": state["transformer.ln_f.weight"]}), "twice"),
        (lambda state: state.update({"step": 3}), "'step', which is no plain tensor"),
        (lambda state: state.update({"x": torch.zeros(2, device="meta")}), "'x', which is no plain tensor"),
        (lambda state: state.clear(), "no tensors by name"),
    ],
)
def test_tensors_that_are_not_those_of_the_configuration(model: Callable[..., Path], change: Callable[[State], Any], said: str) -> None:
    assert said in refusal(model(change))


class Planted:
    """Runs when it is unpickled by a loader that lets it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.witness)!r}, 'w').close()",)


@pytest.mark.parametrize("place", ["model", "training run", "bare pickle"])
def test_a_planted_pickle_does_not_run(tmp_path: Path, place: str) -> None:
    config, witness = configuration("attractor"), tmp_path / "witness"
    state: dict[str, Any] = {**random_state(config), "transformer.ln_f.weight": Planted(witness)}
    source = write_model(tmp_path / "theirs", config, state)
    if place == "training run":
        (source / "config.json").rename(source / "model_config.json")
        (source / "checkpoints-DDPStrategy").mkdir()
        torch.save({"model": random_state(config), "lr_scheduler": Planted(witness)}, source / "checkpoints-DDPStrategy" / "last-x")
    if place == "bare pickle":
        (source / "model.pt").write_bytes(pickle.dumps(state))
    said = refusal(source)
    assert not witness.exists()
    assert ("exec" in said and "_export_attractor_for_hf.py" in said) or place == "bare pickle"
    torch.load(source / "model.pt" if place != "training run" else source / "checkpoints-DDPStrategy" / "last-x", weights_only=False) if (
        place != "bare pickle"
    ) else pickle.loads((source / "model.pt").read_bytes())
    assert witness.exists()  # it would have run


@pytest.mark.parametrize("file", ["model.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 1000, -100])
def test_a_file_cut_short(tmp_path: Path, file: str, kept: int) -> None:
    from safetensors.torch import save_file

    config = configuration("attractor")
    state = random_state(config)
    source = write_model(tmp_path / "theirs", config, state, "model.pt")
    (source / "model.pt").rename(source / file)
    if file == "model.safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, source / file)
    whole = (source / file).read_bytes()
    (source / file).write_bytes(whole[: kept if kept >= 0 else len(whole) + kept])
    assert "cut short" in refusal(source)


def test_an_index_that_climbs_out_of_its_folder_and_one_whose_shard_is_missing(model: Callable[..., Path], tmp_path: Path) -> None:
    source = model()
    (source / "model.pt").unlink()
    for file, said in (("../secret.safetensors", "not a plain name"), ("model-00001-of-00002.safetensors", "is missing")):
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.ln_f.weight": file}}))
        assert said in refusal(source)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    assert "nothing at" in refusal(source)
    source.mkdir()
    assert "neither config.json nor model_config.json" in refusal(source)
    (source / "config.json").write_text("{")
    assert "is not JSON" in refusal(source)
    (source / "config.json").write_text("[" * 10**5)
    assert "is not JSON" in refusal(source)
    (source / "config.json").write_text("[]")
    assert "no configuration" in refusal(source)
    (source / "config.json").write_text(json.dumps(configuration("gpt")))
    assert "no weights" in refusal(source)
    (source / "model_config.json").write_text("{}")
    assert "no checkpoint file" in refusal(source)
    (source / "checkpoints-x").mkdir()
    for name in ("step-1", "step-2"):
        (source / "checkpoints-x" / name).write_bytes(b"x")
    assert "several checkpoints (step-1, step-2)" in refusal(source)
    (source / "checkpoints-x" / "last-a").write_bytes(b"x")
    assert "last-a is no whole file" in refusal(source)
    (tmp_path / "alone").write_bytes(b"x")
    assert "no model_config.json beside" in refusal(tmp_path / "alone")


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_a_target_that_exists(model: Callable[..., Path], tmp_path: Path, there: str) -> None:
    target = tmp_path / "run"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to("nowhere")}[there]()
    assert "is there already" in refusal(model())


def test_a_disk_that_refuses_leaves_nothing(model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.durable.fsync_folder", full)
    with pytest.raises(RunStopped, match="No space left") as stopped:
        import_run(source, tmp_path / "run")
    assert stopped.value.code == BAD_CHECKPOINT_WRITE
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_import_that_was_killed_is_no_obstacle(model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / ".run.partial" / "checkpoints").mkdir(parents=True)
    import_run(model(), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "run"}


def tokenizer_of(data: Path, target: Path, **changes: Any) -> Path:
    """The tokenizer of the prepared text, changed."""
    document = json.loads((data / "tokenizer.json").read_text())
    target.write_text(json.dumps({**document, **changes}))
    return target


def wide(tmp_path: Path, name: str = "wide") -> Path:
    """A model whose embedding has room for the prepared text's tokenizer."""
    config = configuration("gpt", vocab_size=300, padded_vocab_size=320)
    return write_model(tmp_path / name, config, random_state(config))


def test_a_tokenizer_that_does_not_fit(model: Callable[..., Path], tmp_path: Path, data: Path) -> None:
    assert f"ids up to 299, and the model's embedding {ROWS} rows" in refusal(model(), tokenizer=data / "tokenizer.json")
    assert "cannot be read" in refusal(tmp_path / "theirs", tokenizer=tmp_path / "nowhere.json")
    assert "vocabulary_size=96 is smaller than the 300 entries" in refusal(tmp_path / "theirs", data=str(data))


def test_data_of_another_tokenizer(tmp_path: Path, data: Path) -> None:
    other = tokenizer_of(data, tmp_path / "other.json", added_tokens=[])
    said = refusal(wide(tmp_path), tokenizer=other, data=str(data))
    assert "prepared with another tokenizer" in said
    assert open_manifest(data).tokenizer_fingerprint[:12] in said
    assert "not a finished prepared set" in refusal(tmp_path / "wide", data=str(tmp_path / "nothing"))


def test_the_tokenizer_beside_the_model_the_one_given_and_that_of_the_data(tmp_path: Path, data: Path) -> None:
    source = wide(tmp_path)
    report = import_run(source, tmp_path / "bare")
    assert not report["tokenizer"]
    assert "No tokenizer was found" in report["notes"][0]
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    report = import_run(source, tmp_path / "of the data", data=str(data))
    assert "that of the data was taken" in report["notes"][0]
    kept = tokenizer_of(data, source / "tokenizer.json")
    assert import_run(source, tmp_path / "beside")["notes"] == []
    assert (tmp_path / "beside" / "tokenizer.json").read_text() == kept.read_text()
    anonymous = json.loads(kept.read_text().replace("<|endoftext|>", "<|nobody|>"))
    given = tokenizer_of(data, tmp_path / "given.json", **anonymous)
    (note,) = import_run(source, tmp_path / "given", tokenizer=given)["notes"]
    assert "one of which must begin each document" in note


def test_the_data_decides_the_length_of_sequences(tmp_path: Path, data: Path) -> None:
    source = wide(tmp_path)
    tokenizer_of(data, source / "tokenizer.json")
    report = import_run(source, tmp_path / "run", data=str(data))
    assert report["sequence_length"] == 16
    assert report["notes"] == ["The model was trained on sequences of 24 tokens; the run takes 16, as the data."]
