"""A model opened from a folder: a run's, with its tokenizer; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain import checkpoint_files as files
from pretrain.errors import Refusal
from pretrain.loaded import load_model, load_run, load_weights
from pretrain.run_folder import CHECKPOINTS, TOKENIZER
from tests.distributed.ranks import run_ranks
from tests.pretrain.tiny_run import SETTINGS, TARGET, prepare_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = prepare_text(folder / "data")
    run_ranks(TARGET, 1, str(folder / "run"), str(data), [], False, [*SETTINGS, "train.tokens=128"])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def checkpoint(run: Path) -> Path:
    return run / CHECKPOINTS / (files.read_pointer(run / CHECKPOINTS) or "")


def test_a_run_is_opened_with_its_average_and_its_own_tokenizer(run: Path, trained: Path) -> None:
    loaded = load_model(run)
    assert loaded.which == "average.safetensors"  # the recipe keeps one
    held = load_file(checkpoint(run) / "average.safetensors")
    assert all(torch.equal(parameter, held[name]) for name, parameter in loaded.model.named_parameters())
    assert loaded.find_tokenizer() == run / TOKENIZER
    assert (run / TOKENIZER).read_bytes() == (trained / "data" / "prepared" / TOKENIZER).read_bytes()
    assert loaded.tokenizer().id_to_token(loaded.begin_id) == "<|endoftext|>"
    assert load_model(run, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_a_run_without_a_tokenizer_has_that_of_its_data(run: Path, trained: Path) -> None:
    (run / TOKENIZER).unlink()
    assert load_run(run).find_tokenizer() == trained / "data" / "prepared" / TOKENIZER


def test_a_tokenizer_of_more_entries_than_the_model_has_rows(run: Path) -> None:
    tokenizer = json.loads((run / TOKENIZER).read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**first, "id": 300 + n, "content": f"<|{n}|>"} for n in range(40)]
    (run / TOKENIZER).write_text(json.dumps(tokenizer))
    with pytest.raises(Refusal, match=r"not this model's tokenizer"):
        load_run(run).tokenizer()


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="neither a run nor an export"):
        load_model(tmp_path)


def test_tensors_of_another_model(run: Path, tmp_path: Path) -> None:
    architecture = load_run(run).architecture
    whole = load_file(checkpoint(run) / "weights.safetensors")
    lacking = {name: tensor for name, tensor in whole.items() if name != "norm.weight"}
    for tensors, said in (
        (lacking, "lacks norm.weight"),
        ({**whole, "backdoor": torch.zeros(1)}, "has an unknown tensor: backdoor"),
        ({**whole, "norm.weight": torch.ones(3)}, r"norm.weight has the shape \(3,\) and must be \(32,\)"),
    ):
        save_file(tensors, tmp_path / "weights.safetensors")
        with pytest.raises(Refusal, match=said):
            load_weights(architecture, tmp_path, "weights", torch.device("cpu"), torch.float32)
