"""`attractor generate`: text from a run or an export. docs/generation.md shows a session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.output import console, deliver, print_note
from pretrain.errors import Refusal

EPILOG = """\
[bold]Examples[/]

  attractor generate runs/demo --prompt "The first thing to know"

  attractor generate runs/demo --prompt "Once" --prompt "In the year 1900" --temperature 0.8 --top-k 50 --seed 1

  attractor generate exports/demo --prompts prompts.txt --solver-iterations 0 --max-tokens 64 --json
"""


def parse_depth(text: str | None) -> int | str | None:
    """None (the model's own), `auto` or a number. Raises Refusal for anything else."""
    if text is None or text == "auto":
        return text
    if text.isdecimal():
        return int(text)
    raise Refusal(f"--solver-iterations {text} is neither auto nor a number of iterations from 0.")


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Those given and the file's, one a line; one that is empty where there are none. Raises Refusal for a file that has none, and for
    bytes that are no text."""
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise Refusal(f"--prompt {prompt!a} is not UTF-8, so it is no text that a tokenizer could read. Give it in UTF-8.")
    if file is None:
        return prompts or [""]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"The prompts in {file} cannot be read ({error}). Give a text file in UTF-8 with a prompt on every line.") from error
    if not lines:
        raise Refusal(f"{file} holds no prompt: it is empty. Write one on every line; an empty line is an empty prompt.")
    return [*prompts, *lines]


def command(
    path: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="A run folder or an export, such as runs/demo.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="What the text begins with; again for several. Without: nothing.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line, solved in one batch.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="New tokens, unless the text ends before.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="1 draws from the model's distribution; 0 takes the most probable token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Draw from the K most probable tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Draw from the fewest tokens whose probabilities reach P.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="The same seed draws the same text.")] = 0,
    solver_iterations: Annotated[
        str | None,
        typer.Option(
            "--solver-iterations",
            metavar="auto|N",
            help="auto solves every token to the tolerance; 0 decodes the proposal, at the backbone's cost.",
            show_default="the export's, of a run auto",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Write text after a prompt, with a cache of keys and values in the backbone and in the attractor."""
    depth = parse_depth(solver_iterations)
    texts = read_prompts(prompt or [], prompts)
    shown = not as_json and len(texts) == 1

    def compute() -> dict[str, Any]:
        from model.generation import Sampling
        from pretrain.generate import generate_text, load_to_generate

        try:
            sampling = Sampling(temperature, top_k, top_p, seed)
        except ValueError as error:
            raise Refusal(str(error)) from error
        loaded = load_to_generate(path)
        if not shown:
            return generate_text(loaded, texts, max_tokens, sampling, depth)
        _write(texts[0])
        try:
            result = generate_text(loaded, texts, max_tokens, sampling, depth, lambda _, piece: _write(piece))
        except (KeyboardInterrupt, Refusal):  # whoever speaks next begins a line
            _write("\n")
            raise
        _write("\n")
        return result

    deliver(as_json, compute, _show)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _show(result: dict[str, Any]) -> None:
    if len(result["samples"]) > 1:
        out = console()
        for number, sample in enumerate(result["samples"], 1):
            out.rule(f"{number}", align="left", style="dim")
            _write(f"{sample['prompt']}{sample['text']}\n")
    parts = [f"{result['prompt_tokens']} tokens of prompt in {result['prompt_seconds']:.2f} s", f"{result['tokens']} new"]
    if result["tokens_per_second"] is not None:
        parts.append(f"{result['tokens_per_second']:.0f} tokens/s")
    if result["iterations_per_token"] is not None:
        parts.append(f"{result['iterations_per_token']:.2f} iterations a token")
    print_note(f"{', '.join(parts)}.")
    if result["beyond_trained"]:
        print_note(f"Longer than the {result['sequence_length']} tokens the model was trained on: what lies beyond may be worse.")
