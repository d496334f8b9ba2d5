"""A study from its data to its report: trains the arms, evaluates each, compares them. What is finished is not done again.

    DIR/data             where the study prepares its own
    DIR/ARM              run folders; evaluation.json in each, by solver iterations, on the whole validation split
    DIR/compare          pretrain/compare.py: plots, crossings, intervals
    DIR/report.md, study.json

Torch is imported once an evaluation needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.commands.data import preparing
from launchers.output import fraction_bar, print_note
from launchers.series import check, finished, one_after_another
from launchers.study import Prepared, Study
from launchers.study_arms import Arms, Entry
from pretrain import durable
from pretrain.config import stated
from pretrain.errors import Refusal, RunStopped
from pretrain.run_folder import dump

EVALUATION = "evaluation.json"


def prepared(data: Prepared, out: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides with a data.path: as given, or of what the study prepares itself. Raises Refusal where it may not."""
    if {"data.path"} & stated(overrides):
        return list(overrides)
    folder = out / "data"
    if not data.prepare:
        raise Refusal(
            f"data.path is missing, and this study does not fetch its own data. Prepare it with `attractor data prepare "
            f"{' '.join(data.sources)} --out DIR --vocab-size {data.vocabulary_size} --sequence-length {data.sequence_length} --validation "
            f"{data.validation:g}`, then add data.path=DIR."
        )
    from data_pipeline import prepare
    from data_pipeline.manifest import MANIFEST

    if not (folder / MANIFEST).exists():
        print_note(f"Preparing {', '.join(data.sources)} in {folder}")
        with preparing() as report:
            prepare(
                data.sources,
                folder,
                vocabulary_size=data.vocabulary_size,
                sequence_length=data.sequence_length,
                validation=data.validation,
                workers=2,
                progress=report,
            )
    return [f"data.path={json.dumps(str(folder))}", *overrides]


def train(arms: Arms) -> list[Entry]:
    """Trains every arm that has not finished. Raises RunStopped where a signal stopped it, or once the others are done where one failed."""
    entries = arms.resolve()
    check([entry.member for entry in entries], arms.gpus)
    failed: dict[str, int] = {}
    with one_after_another(arms.gpus) as train_member:
        for number in range(len(entries)):
            entry = arms.resolve()[number]  # what has finished meanwhile may set its budget
            waits = entry.arm.waits_for in failed
            state = "waits for an arm that failed" if waits else "has finished already" if finished(entry.member.run) else "trains"
            print_note(
                f"[{number + 1}/{len(entries)}] {entry.name} {state}: {entry.tokens:,} tokens ({entry.basis}), in {entry.member.run}"
            )
            code = failed[str(entry.arm.waits_for)] if waits else train_member(entry.member)
            if code:
                failed[entry.name] = code
    if failed:
        said = ", ".join(f"{name} (code {code})" for name, code in failed.items())
        raise RunStopped(
            f"{len(failed)} of {len(entries)} arms did not finish: {said}. What they said is above; the same command goes on from here.",
            next(iter(failed.values())),
        )
    return arms.resolve()


def evaluate(entries: Sequence[Entry], study: Study, core: Path | None) -> dict[str, dict[str, Any]]:
    """Losses by solver iterations of every arm on the whole validation split, and CORE where a bundle is given; kept in the run folders."""
    found = {}
    for entry in entries:
        kept = entry.member.run / EVALUATION
        report = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        asked = {"depths": list(study.evaluation.depths), "bundle": str(core) if core else None}
        if report.get("asked") != asked:
            from pretrain.evaluate import evaluate_run

            with fraction_bar(f"{entry.name}: validation") as progress:
                report = {"asked": asked, **evaluate_run(entry.member.run, study.evaluation.depths, progress=progress)}
            if core is not None:
                from pretrain.downstream.core_tasks import evaluate_core_run

                with fraction_bar(f"{entry.name}: CORE") as progress:
                    report["core"] = evaluate_core_run(entry.member.run, core, progress=progress)["core"]
            durable.write_atomically(kept, dump(report, indent=1) + "\n")
        found[entry.name] = report
    return found


def compare(entries: Sequence[Entry], out: Path) -> dict[str, Any]:
    """The comparison of all arms, in DIR/compare."""
    from pretrain.compare import compare_runs

    with fraction_bar("comparing") as progress:
        return compare_runs(
            [entry.member.run for entry in entries], out / "compare", names=[entry.name for entry in entries], progress=progress
        )
