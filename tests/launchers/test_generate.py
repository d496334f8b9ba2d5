"""`attractor generate` on a run that nothing trained: what is shown and kept, streaming, and refusals before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from data_pipeline.tokenizer import id_count
from launchers.cli import app
from model.generation import Sampling
from pretrain.errors import Refusal
from pretrain.generate import generate_text
from pretrain.loaded import load_run
from tests.pretrain.tiny_run import LENGTH, prepare_text
from tests.pretrain.untrained_runs import write_untrained_run


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("untrained")
    return write_untrained_run(where / "run", prepare_text(where / "data"))


def document(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_text_follows_the_prompt_and_what_it_took_goes_to_standard_error(folder: Path) -> None:
    arguments = (str(folder), "--prompt", "Document 7 says", "--max-tokens", "12", "--seed", "3")
    report = document(*arguments)
    (sample,) = report["samples"]
    shown = run(*arguments)
    assert shown.stdout == f"Document 7 says{sample['text']}\n"
    assert "12 new" in shown.stderr
    assert "iterations a token" in shown.stderr
    assert load_run(folder).tokenizer().decode(sample["tokens"]) == sample["text"]
    assert len(sample["tokens"]) == len(sample["iterations"]) == report["tokens"] == 12
    assert report["iterations_per_token"] == pytest.approx(sum(sample["iterations"][1:]) / 11)
    assert report["sampling"] == {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 3}
    assert report == document(*arguments) | {name: report[name] for name in ("prompt_seconds", "seconds", "tokens_per_second")}


def test_prompts_of_a_file_are_a_batch_and_each_is_what_it_is_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Document 1 says that 1\n\nDoc\n", encoding="utf-8")
    settings = ("--max-tokens", "8", "--temperature", "0")
    report = document(str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "first", *settings)
    prompts = [sample["prompt"] for sample in report["samples"]]
    assert prompts == ["first", "Document 1 says that 1", "", "Doc"]
    for sample in report["samples"]:
        assert document(str(folder), "--prompt", sample["prompt"], *settings)["samples"][0]["tokens"] == sample["tokens"]
    shown = run(str(folder), "--prompts", str(tmp_path / "prompts.txt"), *settings).stdout
    assert all(f"{sample['prompt']}{sample['text']}\n" in shown for sample in report["samples"][1:])


def test_depth_and_length(folder: Path) -> None:
    plain = document(str(folder), "--solver-iterations", "0", "--max-tokens", "4")
    assert (plain["solver_iterations"], plain["iterations_per_token"], plain["beyond_trained"]) == (0, None, False)
    assert document(str(folder), "--solver-iterations", "3", "--max-tokens", "4")["iterations_per_token"] == 3
    long = run(str(folder), "--max-tokens", str(LENGTH + 1))
    assert f"Longer than the {LENGTH} tokens" in long.stderr


def test_pieces_are_whole_characters_and_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a model that says what it is told: tokens of one byte, three of which are one character
    loaded = load_run(folder)
    tokenizer = loaded.tokenizer()
    want = "a€ü, 漢"
    tokens = [token for character in want.encode() for token in [_byte(tokenizer, character)]]
    steps = iter(tokens)

    def told(*_: Any, **__: Any) -> Any:
        from model.generation import Step

        return (Step([0], [token], []) for token in steps)

    monkeypatch.setattr("pretrain.generate.generate", told)
    pieces: list[str] = []
    result = generate_text(loaded, ["Doc"], len(tokens), Sampling(), hand_out=lambda _, piece: pieces.append(piece))
    assert result["samples"][0]["text"] == "".join(pieces) == want
    assert pieces == ["a", "", "", "€", "", "ü", ",", " ", "", "", "漢", ""]
    steps = iter(tokens[:3])  # and what is cut short is told at the end
    assert generate_text(loaded, ["Doc"], 3, Sampling())["samples"][0]["text"].startswith("a\ufffd")


def _byte(tokenizer: Any, byte: int) -> int:
    """The entry of one byte in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [number for number in range(256) if number not in printable]
    character = chr(byte) if byte in printable else chr(256 + others.index(byte))
    assert character in pre_tokenizers.ByteLevel.alphabet()
    return int(tokenizer.token_to_id(character))


def test_padding_of_the_vocabulary_and_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    padded = write_untrained_run(tmp_path / "padded", prepare_text(tmp_path / "data"), "model.vocabulary_size=5000")
    loaded = load_run(padded)
    entries = id_count(loaded.tokenizer())
    assert entries < 1000, "most of the rows are padding"
    (sample,) = generate_text(loaded, ["Doc"], 20, Sampling())["samples"]
    assert max(sample["tokens"]) < entries
    with torch.no_grad():
        loaded.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Refusal, match="not finite"):
        generate_text(loaded, ["Doc"], 2, Sampling())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--top-p", "1.5"), "top-p"),
        (("--top-k", "0"), "top-k"),
        (("--temperature", "-1"), "temperature"),
        (("--solver-iterations", "many"), "neither auto nor a number"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("--prompt", "a\udcff"), "not UTF-8"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_looked_for(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = run(str(tmp_path), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_bad_paths_and_files_are_refused(folder: Path, tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert (result.exit_code, "neither a run nor an export" in result.stderr) == (2, True)
    (tmp_path / "none.txt").write_text("")
    result = run(str(folder), "--prompts", str(tmp_path / "none.txt"))
    assert (result.exit_code, "holds no prompt" in result.stderr) == (2, True)
