"""Several runs as one Slurm file: a task of an array each, submitted so that a run waits for those whose result it needs. No torch.

    bash FILE     sbatch --array=0,1,2;  sbatch --array=3 --dependency=afterok:<0>;  and last the command that makes the table

A run whose words are known now has them in the file; one whose budget follows from another's result asks for them when its turn
comes. The template is launchers/templates/slurm-array.sh; it saves, requeues and resumes as that of `attractor launch slurm` does.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.commands.launch import TEMPLATES, Sheet
from launchers.commands.train import ENTRY
from pretrain.errors import Refusal


@dataclass(frozen=True)
class Job:
    """A run of the file."""

    name: str
    words: Sequence[str]
    """What `attractor train` is given; with `asks`, the words of the `attractor` command that prints them, one a line."""
    run: Path
    asks: bool = False
    needs: tuple[int, ...] = ()
    """Jobs, by number, that must have finished before it starts."""


def array(name: str, jobs: Sequence[Job], nodes: int, gpus: int, table: Sequence[str]) -> str:
    """The file. table: the words of the `attractor` command that says how it all went. Raises Refusal for words with line breaks."""
    if any("\n" in word for job in jobs for word in (*job.words, str(job.run))):
        raise Refusal("An override holds a line break, which a job file cannot carry: put it into a recipe file.")
    return Sheet((TEMPLATES / "slurm-array.sh").read_text(encoding="utf-8")).substitute(
        name=re.sub(r"[^\w.-]+", "-", name).strip("-"),
        count=len(jobs),
        nodes=nodes,
        gpus=gpus,
        submit="\n".join(f"    {line}" for line in _submit(jobs)),
        cases="\n".join(_case(number, job) for number, job in enumerate(jobs)),
        table=shlex.join(table),
        python=shlex.quote(sys.executable),
        entry=shlex.quote(str(ENTRY)),
    )


def _submit(jobs: Sequence[Job]) -> list[str]:
    """Lines that submit the jobs: those that need nothing as one array, then each of the others, then the table."""
    free = [number for number, job in enumerate(jobs) if not job.needs]
    lines = [f'free=$(sbatch --parsable --array={",".join(map(str, free))} "$0")', "free=${free%%;*}"]
    task = {number: f"${{free}}_{number}" for number in free}
    for number, job in enumerate(jobs):
        if job.needs:
            waits = ":".join(task[other] for other in job.needs)
            lines += [f'job_{number}=$(sbatch --parsable --array={number} --dependency=afterok:{waits} "$0")']
            lines += [f"job_{number}=${{job_{number}%%;*}}"]
            task[number] = f"${{job_{number}}}_{number}"
    whole = ":".join(["$free", *(f"$job_{number}" for number in range(len(jobs)) if number not in free)])
    return [*lines, f'sbatch --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --dependency=afterok:{whole} "$0" table']


def _case(number: int, job: Job) -> str:
    words = f"words=({shlex.join(job.words)})"
    if job.asks:
        asked = f"{shlex.quote(sys.executable)} -m launchers {shlex.join(job.words)}"
        words = f'said=$({asked}) || exit\n    mapfile -t words <<<"$said"'
    return f"{number}) # {job.name}\n    run_dir={shlex.quote(str(job.run))}\n    {words}\n    ;;"
