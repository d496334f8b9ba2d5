"""Runs one after another: each trained as `attractor train` would, in a process of its own, in a folder of its own.

    recipes = check(members, ranks)                        every refusal comes before anything starts, and names its member
    with one_after_another(ranks) as train:
        for member in members: code = train(member)        0: finished, now or before; else how it ended

A folder decides what is left to do: nothing where summary.json says that the last step was evaluated, the rest where a run was
interrupted (--resume), all where there is none. A folder whose run had other settings is refused, since its figures would answer
another question. SIGTERM, SIGUSR1 and Ctrl-C end the series: the running member saves first. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.commands.train import check as check_run
from launchers.local import PR_SET_PDEATHSIG, noting_signals
from launchers.plan import complete
from launchers.puzzle_plan import complete_puzzles
from pretrain.config import AnyRecipe, PuzzleRecipe, load_any, read_recipe, stated
from pretrain.errors import SIGNALLED, Refusal, RunStopped
from pretrain.overrides import parse_yaml
from pretrain.run_folder import CONFIG, SUMMARY

_OWN = {"run.dir": "--out DIR names the folder, and every run has its own in it", "run.name": "every run is named by what it is"}
_MAY_DIFFER = {
    *("run.dir", "train.micro_batch", "train.recompute", "train.device", "train.log_every"),
    *("data.workers", "data.cache", "evaluation.batch"),
}
"""Keys that say where and how fast a run is trained, and not what; so does every key of the layout."""


@dataclass(frozen=True)
class Member:
    """A run of the series: what it is called, what it trains, and where."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    run: Path

    @property
    def words(self) -> list[str]:
        """What `attractor train` is given."""
        return [self.recipe, *self.overrides, override("run.name", self.name), override("run.dir", str(self.run))]

    def load(self) -> AnyRecipe:
        """Its recipe. Raises Refusal that names it."""
        with naming(self.name):
            return load_any(self.words[0], self.words[1:])


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Refusals inside say whose they are."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(f"{name}: {refusal}") from refusal


def override(key: str, value: Any) -> str:
    """`key=value` that parses back to the value: words as they are where YAML reads them as such."""
    plain = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, str) and not (re.fullmatch(r"[\w./+-]+", value) and parse_yaml(value, key) == value):
        plain = json.dumps(value)
    return f"{key}={plain}"


def refuse_own(overrides: Sequence[str]) -> None:
    """Raises Refusal for overrides of what each run of a series is given by itself."""
    for key in sorted(stated(overrides) & _OWN.keys()):
        raise Refusal(f"{key} cannot be set for several runs at once: {_OWN[key]}.")


def summary(run: Path) -> dict[str, Any]:
    """summary.json of a run folder; empty where there is none."""
    path = run / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def started(run: Path) -> bool:
    return (run / CONFIG).exists()


def finished(run: Path) -> bool:
    """Whether the last step was taken, and evaluated: a run may fail in it."""
    found = summary(run)
    return bool(found) and found["step"] == found["total_steps"] == (found["evaluation"] or {}).get("step")


def stored(run: Path) -> AnyRecipe:
    """The recipe of a run that was started."""
    return read_recipe((run / CONFIG).read_text(encoding="utf-8"), str(run / CONFIG))


def completed(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with what the data decides. Raises Refusal where nothing says it."""
    return complete_puzzles(recipe) if isinstance(recipe, PuzzleRecipe) else complete(recipe)


def check(members: Sequence[Member], ranks: int) -> list[AnyRecipe]:
    """The recipes, with what the data decides. Raises Refusal, which names the member, for one that could not be trained."""
    recipes = []
    for member in members:
        recipe = member.load()
        with naming(member.name):
            check_run(recipe, ranks, resume=started(member.run))
            recipe = completed(recipe)
            if started(member.run):
                _refuse_other(recipe, member.run)
        recipes.append(recipe)
    return recipes


def _refuse_other(recipe: AnyRecipe, run: Path) -> None:
    """Raises Refusal where the run in the folder is not the one that is asked for."""
    kept = stored(run)
    if type(kept) is not type(recipe):
        raise Refusal(
            f"{run} holds a run of another regime: one of the two is of puzzles, and the other of text. Choose another --out, or move that "
            "folder away."
        )
    there, asked = _flat(kept), _flat(recipe)
    differ = [key for key in asked if there[key] != asked[key] and key not in _MAY_DIFFER and not key.startswith("layout.")]
    if differ:
        said = ", ".join(f"{key}={json.dumps(there[key])} (asked for: {json.dumps(asked[key])})" for key in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise Refusal(
            f"{run} holds a run with other settings: {said}{more}. Ask for the same again, choose another --out, or move that folder away."
        )


def _flat(recipe: AnyRecipe) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, body in recipe.model_dump(mode="json").items() for key, value in body.items()}


@contextlib.contextmanager
def one_after_another(ranks: int) -> Iterator[Callable[[Member], int]]:
    """Yields what trains a member and returns 0 once its run is whole, or the code it ended with. That raises RunStopped (code 3)
    once a signal has asked for an end: the first lets the running member save, a second one ends it at once."""
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if len(received) > 1 else signal.SIGTERM)

    with noting_signals(pass_on) as received:

        def train(member: Member) -> int:
            _refuse_after(received, member, None)
            if finished(member.run):
                return 0
            process = _start(member, ranks)
            running[:] = [process]
            if received:  # it came while the process was being made
                pass_on(received[-1])
            code = process.wait()
            with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
                os.killpg(process.pid, signal.SIGKILL)
            if code == SIGNALLED or not finished(member.run):
                _refuse_after(received or ([signal.SIGTERM] if code == SIGNALLED else []), member, code)
            return code if code >= 0 else 128 - code

        yield train


def _start(member: Member, ranks: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def save_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    words = ["train", *member.words, "--procs", str(ranks), *(["--resume"] if started(member.run) else [])]
    command = [sys.executable, "-m", "launchers", *words]
    return subprocess.Popen(command, start_new_session=True, preexec_fn=save_with_parent)


def _refuse_after(received: Sequence[int], member: Member, code: int | None) -> None:
    if received:
        begun = code is not None and started(member.run)
        state = "has saved" if code == SIGNALLED else "goes on from its last checkpoint" if begun else "had not begun"
        raise RunStopped(f"Stopped by a signal; {member.name} {state}. The same command goes on from here.", SIGNALLED)
