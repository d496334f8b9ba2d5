"""What a study found: the four numbers and the losses of every arm, what was planned beside what was measured, each question answered.

    planned    tokens * FLOPs a token at the recipe's expected iterations, before anything ran
    closed     tokens * FLOPs a token at the work that was measured: the plan's formula
    ledger     the sum over the run's steps, of summary.json        closed and ledger must agree

A question is answered by the interval of the difference on the validation set (pretrain/compare_bootstrap.py): yes where all of it is
below zero, no where all is above, else not told apart. Beside the answer stands what the two arms agree in and what not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.series import summary
from launchers.study import Question, Study
from launchers.study_arms import Entry
from model.cost import planned
from pretrain import durable
from pretrain.compare_report import MATCHED
from pretrain.matching import run_flops
from pretrain.measured import measured
from pretrain.run_folder import dump

REPORT, DOCUMENT = "report.md", "study.json"
SIZES = {"total": "total parameters", "matmul": "matmul parameters", "tokens": "tokens", "flops": "FLOPs"}


def make_report(
    name: str, study: Study, entries: Sequence[Entry], evaluations: Mapping[str, dict[str, Any]], compared: dict[str, Any]
) -> dict[str, Any]:
    """The whole report as one JSON document. evaluations: by arm; compared: of pretrain.compare, over all arms."""
    arms = {entry.name: _arm(entry, evaluations[entry.name]) for entry in entries}
    for entry in entries:
        if source := entry.arm.waits_for:
            arms[entry.name]["matched"] = {"to": source, "ratio": arms[entry.name]["flops"]["ledger"] / arms[source]["flops"]["ledger"]}
    documents = compared["documents"]
    return {
        "study": name,
        "asks": study.asks,
        "answers": [_answer(question, arms, documents) for question in study.questions],
        "arms": arms,
        "documents": {key: documents[key] for key in ("documents", "tokens", "level", "resamples")},
        "findings": compared["findings"],
        "plots": [f"compare/{plot}" for plot in compared["plots"]],
        "core": "asked" if any("core" in found for found in evaluations.values()) else "not asked",
        "asked_for_core": "core" in study.evaluation.tasks,
    }


def _arm(entry: Entry, evaluation: dict[str, Any]) -> dict[str, Any]:
    run, recipe = entry.member.run, entry.recipe
    found = summary(run)
    iterates = recipe.model.solves or recipe.model.loops
    work = measured(run).work if iterates else None
    ledger, closed = found["flops"]["model"], run_flops(recipe, found["tokens"], work)
    depth = next(reversed(evaluation["loss"]))
    return {
        "run": str(run),
        "recipe": entry.member.recipe,
        "overrides": list(entry.member.overrides),
        "basis": entry.basis,
        "parameters": found["parameters"],
        "tokens": found["tokens"],
        "seconds": found["seconds"],
        "flops": {"planned": run_flops(recipe, found["tokens"]), "closed": closed, "ledger": ledger, "difference": closed / ledger - 1},
        "iterations": {"expected": planned(recipe.architecture).evaluations, "measured": work.evaluations} if work else None,
        "products": {"expected": planned(recipe.architecture).products, "measured": work.products} if work else None,
        "depth": depth,
        "loss": evaluation["loss"][depth],
        "perplexity": evaluation["perplexity"][depth],
        "bits_per_byte": evaluation.get("bits_per_byte", {}).get(depth),
        "core": evaluation.get("core"),
        "by_depth": evaluation["loss"],
    }


def sizes(arm: dict[str, Any]) -> dict[str, float]:
    """The four numbers without which a loss says nothing."""
    counts = arm["parameters"]
    return {"total": counts["total"], "matmul": counts["matmul"], "tokens": arm["tokens"], "flops": arm["flops"]["ledger"]}


def _answer(question: Question, arms: Mapping[str, dict[str, Any]], documents: dict[str, Any]) -> dict[str, Any]:
    first, second = question.arms
    found = next(pair for pair in documents["differences"] if {pair["run"], pair["minus"]} == {first, second})
    sign = 1 if found["run"] == first else -1
    low, high = sorted((sign * found["low"], sign * found["high"]))
    own, other = sizes(arms[first]), sizes(arms[second])
    return {
        "asks": question.asks,
        "arms": [first, second],
        "answer": "yes" if high < 0 else "no" if low > 0 else "not told apart",
        "difference": sign * found["difference"],
        "low": low,
        "high": high,
        "ratios": {size: own[size] / other[size] for size in SIZES},
        "matched": [size for size in SIZES if abs(own[size] / other[size] - 1) <= MATCHED],
    }


def sentence(answer: dict[str, Any], arms: Mapping[str, dict[str, Any]], level: float) -> str:
    """An answer in words."""
    first, second = answer["arms"]
    losses = f"{first} has {arms[first]['loss']:.4f} nats a token and {second} {arms[second]['loss']:.4f}"
    between = f"{answer['difference']:+.4f}, {level:.0%} interval {answer['low']:+.4f} to {answer['high']:+.4f}"
    said = {"yes": "Yes", "no": "No", "not told apart": "These documents do not tell them apart"}[answer["answer"]]
    same = [SIZES[size] for size in answer["matched"]]
    other = [f"{SIZES[size]} ({ratio:.3f} times)" for size, ratio in answer["ratios"].items() if size not in answer["matched"]]
    return (
        f"{answer['asks']} **{said}**: {losses} ({between}). Matched within {MATCHED:.0%}: {', '.join(same) or 'nothing'}; not matched: "
        f"{', '.join(other) or 'nothing'}."
    )


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    arms, documents = report["arms"], report["documents"]
    answers = "\n".join(f"- {sentence(answer, arms, documents['level'])}" for answer in report["answers"])
    parts = [
        f"# {report['study']}",
        report["asks"],
        answers,
        f"Losses are of the whole validation split ({documents['documents']:,} documents, {documents['tokens']:,} predicted tokens), each "
        f"arm at its own depth; intervals are a paired bootstrap over documents, and hold nothing of what another seed would change.",
        "## The arms",
        _table(
            ["arm", "parameters", "in matmuls", "tokens", "FLOPs", "loss", "perplexity", "bits a byte", "CORE", "seconds"], _arm_rows(arms)
        ),
        "FLOPs are the model's, as the ledger of each run summed them up: what the method needs, without recomputation. "
        + ("" if report["core"] == "asked" or not report["asked_for_core"] else "CORE was not asked: give its bundle with --core DIR."),
        "## Loss by solver iterations",
        _table(["arm", *_depths(arms)], [[name, *_by_depth(arm, _depths(arms))] for name, arm in arms.items()]),
        "## Planned and measured",
        _table(
            [
                "arm",
                "tokens from",
                "iterations planned",
                "measured",
                "products planned",
                "measured",
                "FLOPs planned",
                "closed form",
                "ledger",
            ],
            _planned_rows(arms),
        ),
        _agreement(arms),
        "## Over training",
        *(f"![{Path(plot).stem}]({plot})" for plot in report["plots"]),
        "More of the same comparison, its crossings and every pair of arms: [compare/compare.md](compare/compare.md).",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _arm_rows(arms: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name, arm in arms.items():
        size = sizes(arm)
        optional = ["" if arm[key] is None else f"{arm[key]:.4f}" for key in ("bits_per_byte", "core")]
        counts = [f"{size[key]:,}" for key in ("total", "matmul", "tokens")]
        rows.append(
            [name, *counts, f"{size['flops']:.4g}", f"{arm['loss']:.4f}", f"{arm['perplexity']:.2f}", *optional, f"{arm['seconds']:,.0f}"]
        )
    return rows


def _planned_rows(arms: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name, arm in arms.items():
        counted = [
            f"{arm[what][when]:.2f}" if arm[what] else "" for what in ("iterations", "products") for when in ("expected", "measured")
        ]
        rows.append([name, arm["basis"], *counted, *(f"{arm['flops'][key]:.4g}" for key in ("planned", "closed", "ledger"))])
    return rows


def _agreement(arms: Mapping[str, dict[str, Any]]) -> str:
    """How well the closed form and the ledger, and matched FLOPs, agree."""
    worst = max(arms, key=lambda name: abs(arms[name]["flops"]["difference"]))
    off = 100 * arms[worst]["flops"]["difference"]
    said = [f"At the measured work the plan's closed form differs from the ledger by {off:+.1e} % at most ({worst})."]
    for name, arm in arms.items():
        if arm["iterations"]:
            said.append(f"{name} spent {_percent(arm['flops']['ledger'] / arm['flops']['planned'])} than its expected iterations planned.")
    for name, arm in arms.items():
        if "matched" in arm:
            said.append(f"{name} spent {_percent(arm['matched']['ratio'])} than {arm['matched']['to']}, whose FLOPs it was to match.")
    return " ".join(said)


def _percent(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.2f} % {'more' if ratio > 1 else 'less'}"


def _depths(arms: Mapping[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(depth for arm in arms.values() for depth in arm["by_depth"]))


def _by_depth(arm: dict[str, Any], depths: Sequence[str]) -> list[str]:
    return [f"{arm['by_depth'][depth]:.4f}" if depth in arm["by_depth"] else "" for depth in depths]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(report: dict[str, Any], out: Path) -> Path:
    """study.json and report.md in the study's folder; the latter is returned. Each whole or not at all."""
    durable.write_atomically(out / DOCUMENT, dump(report, indent=1) + "\n")
    durable.write_atomically(out / REPORT, markdown(report))
    return out / REPORT
