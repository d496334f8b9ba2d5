"""README.md of an export: what the model is, what it was trained on and at what cost, how good it is at which depth, and how to load it.

Everything in it is read from the run folder. What the run does not tell is left out, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.cost import Parameters
from pretrain.config import Recipe
from pretrain.run_folder import EVALUATIONS, IMPORTED, SUMMARY


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card tells."""

    recipe: Recipe
    step: int
    which: str
    """The checkpoint's file that the weights came from."""
    parameters: Parameters
    solver_iterations: int | str
    begin: str
    """The begin token."""
    sequence_length: int
    compared: Mapping[str, float]
    """Largest difference of the logits by depth (export_check.py)."""
    stock: str | None
    """The class of transformers of a code-free export."""
    record: Mapping[str, Any]
    """What `run_record` found."""


def run_record(run: Path, step: int) -> dict[str, Any]:
    """Tokens and FLOPs of a run (summary.json), its evaluation at `step`, or the last before, and what its weights were imported from."""
    record: dict[str, Any] = {}
    if imported := _json_lines(run / IMPORTED, whole=True):
        record["imported"] = {"source": Path(imported[0]["source"]).name, "sha256": imported[0]["sha256"]}
    summary = _json_lines(run / SUMMARY, whole=True)
    if summary and summary[0].get("step") == step:
        record |= {"tokens": summary[0].get("tokens"), "flops": (summary[0].get("flops") or {}).get("total")}
    evaluations = [entry for entry in _json_lines(run / EVALUATIONS) if entry.get("step", step + 1) <= step]
    if evaluations:
        record["evaluation"] = evaluations[-1]
    return record


def _json_lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file (whole: of one document); a line a kill left unfinished is no object."""
    found = []
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in [text] if whole else text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def model_card(facts: CardFacts) -> str:
    """The text of README.md."""
    recipe, parts = facts.recipe, [_head(facts), _about(facts), _use(facts)]
    if facts.stock is None and recipe.model.kind != "transformer":
        parts.append(_solver(facts))
    parts += [_texts(facts), _training(facts), _evaluation(facts), _checks(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(facts: CardFacts) -> str:
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(("attractor", facts.recipe.model.kind)))
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}\n---\n\n# {facts.recipe.run.name}"


_KINDS = {
    "attractor": "An Attractor Model (arXiv 2605.12466): a Transformer backbone proposes y0, and a weight-tied map f is solved for its "
    "fixed point y* = f(y*, y0), which the unembedding reads.",
    "transformer": "A causal pre-norm Transformer.",
    "parcae": "A Parcae (arXiv 2604.12946): a Transformer whose middle blocks are applied again and again, with a stable injection.",
    "looped": "A looped Transformer: its middle blocks are applied again and again.",
    "deq": "A deep equilibrium model: the equilibrium of a hidden state that a Transformer backbone drives.",
}


def _about(facts: CardFacts) -> str:
    m, p = facts.recipe.model, facts.parameters
    sizes = f"{p.total:,} parameters: {p.matmul:,} in matrices inside blocks, {p.embedding + p.head:,} in embeddings"
    sizes += f", {p.value_embedding:,} in value embeddings" if p.value_embedding else ""
    blocks = f"{m.backbone_layers} blocks"
    if m.solves:
        blocks += f" in the backbone and {facts.recipe.attractor.layers} in the map"
    elif m.loops:
        blocks += f", {facts.recipe.loop.core} of them in the loop"
    shape = f"width {m.width}, {m.heads} heads of {m.head_dim}, {blocks}, {m.mlp}, vocabulary {m.vocabulary_size:,}"
    text = f"{_KINDS[m.kind]}\n\n{sizes}; {shape}; trained on sequences of {facts.sequence_length} tokens."
    if facts.stock is None:
        return text
    text += f"\n\nThis is a code-free export, in the stock architecture `{facts.stock}` of transformers."
    if m.kind == "attractor":
        text += (
            f" **It is not the whole model**: it holds the backbone's proposal alone, what the model computes at 0 solver iterations. "
            f"The attractor's {p.attractor:,} parameters are dropped, and its loss is the one at 0 iterations below, not the one at `auto`."
        )
    if m.qk_norm:
        text += (
            " Queries and keys carry a constant factor, which makes up for the one epsilon that all norms share there: in fp32 the logits "
            "are those of the training model; in bf16 they round a little differently than in its own architecture."
        )
    return text


def _use(facts: CardFacts) -> str:
    remote, note = "", ""
    if facts.stock is None:
        remote = ", trust_remote_code=True"
        note = "\n\n`trust_remote_code=True` runs modeling_attractor.py of this folder, which needs torch and transformers alone."
    return (
        f"## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{remote})  # the path of this folder\n'
        f'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        f'batch = tokenizer(["The river"], return_tensors="pt", padding=True)\n'
        f"print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=40), skip_special_tokens=True))\n```{note}"
    )


def _solver(facts: CardFacts) -> str:
    recipe, depth = facts.recipe, json.dumps(facts.solver_iterations)
    if recipe.model.loops:
        return (
            f"## Iterations\n\n`solver_iterations` in config.json is {depth}: `auto` applies the loop {recipe.loop.iterations} times, n "
            f"applies it n times. Give `solver_iterations=n` to `from_pretrained`, to a call, or to `generate`."
        )
    proposes = recipe.model.kind == "attractor"
    zero = "0 decodes the proposal and costs what the backbone alone costs" if proposes else "0 decodes the state before the first"
    return (
        f"## Solver\n\n`solver_iterations` in config.json is {depth} and `solver_tolerance` {recipe.solver.tolerance:g}. `auto` solves "
        f"each token to that relative residual, in at most {recipe.solver.max_iterations} evaluations of f; n takes n evaluations; {zero}. "
        f"Give either to `from_pretrained`, or `solver_iterations` to a call or to `generate`. `model.last_iterations` tells what the last "
        f"call took, token by token. The solve is causal: logits depend neither on later tokens nor on padding."
    )


def _texts(facts: CardFacts) -> str:
    why = f"Every document of training began with `{facts.begin}`, so the tokenizer puts it before every text, once; without it the model "
    why += "reads what it never saw in training."
    if facts.record.get("imported") and facts.step == 0:
        why = f"`{facts.begin}` begins a document, so the tokenizer puts it before every text, once."
    return (
        f"## Texts\n\n{why} It ends a generation too, since it begins the next document. A text that spells it out is read as ordinary "
        f"characters."
    )


def _training(facts: CardFacts) -> str:
    recipe, record = facts.recipe, facts.record
    if (imported := record.get("imported")) and facts.step == 0:
        return (
            f"## Training\n\nImported from `{imported['source']}` and not trained since: what trained it is told there. The hashes of its "
            f"files are in attractor.json."
        )
    rows = [
        ("recipe", f"`{recipe.run.name}`; every key is in attractor.json"),
        (
            "data",
            ", ".join(f"`{Path(path).name}` (weight {weight:g})" for path, weight in recipe.sources) if recipe.data.path else "not stated",
        ),
        ("step", f"{facts.step:,}"),
    ]
    if imported:
        rows.append(("began from", f"weights imported from `{imported['source']}`; steps, tokens and FLOPs are those since"))
    if record.get("tokens"):
        rows.append(("tokens", f"{record['tokens']:,}"))
    if record.get("flops"):
        rows.append(("FLOPs", f"{record['flops']:.4g} (hardware, from the run's ledger)"))
    averaged = facts.which.startswith("average")
    rows += [
        ("optimizer", f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}; {recipe.train.global_batch} sequences a step"),
        ("precision", recipe.train.precision),
        ("weights", f"the moving average of the weights, decay {recipe.optimizer.ema}" if averaged else "those of the last step"),
    ]
    return "## Training\n\n" + _table(("", ""), rows)


def _evaluation(facts: CardFacts) -> str:
    evaluation = facts.record.get("evaluation")
    if not evaluation or not evaluation.get("loss"):
        return "## Evaluation\n\nThe run holds no evaluation."
    bits, used = evaluation.get("bits_per_byte") or {}, evaluation.get("iterations") or {}
    rows = []
    for depth, loss in evaluation["loss"].items():
        cells = (loss, (evaluation.get("perplexity") or {}).get(depth), bits.get(depth), used.get(depth))
        rows.append((str(depth), *("" if cell is None else f"{cell:.4g}" if place else f"{cell:.4f}" for place, cell in enumerate(cells))))
    heads = ("solver iterations", "loss", "perplexity", "bits per byte", "iterations taken")
    note = (
        f"Held-out text of the training data, {evaluation.get('predicted_tokens', 0):,} predicted tokens, at step {evaluation['step']:,}."
    )
    if facts.recipe.model.solves:
        note += " There `auto` stops sequence by sequence, here token by token: the two differ by about the tolerance."
    return f"## Evaluation\n\n{note}\n\n" + _table(heads, rows)


def _checks(facts: CardFacts) -> str:
    told = ", ".join(f"{difference:.1e} at {depth}" for depth, difference in facts.compared.items()) + " iterations"
    if facts.recipe.model.kind == "transformer":
        told = f"{facts.compared['0']:.1e}"
    return (
        f"## Checked\n\nBefore it was written, its logits were compared with the training model's in fp32, on random tokens and a real "
        f"prompt. Largest difference, relative to the largest logit where that is above 1: {told}."
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
