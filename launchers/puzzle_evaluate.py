"""What `attractor evaluate` does with a run on puzzles: options read and refused, a report computed and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launchers.output import deliver, fraction_bar
from launchers.puzzle_report import show_pictures, show_puzzle_internalization, show_puzzles
from pretrain.errors import Refusal
from pretrain.run_folder import CONFIG

Options = dict[str, Any]
"""By their names on the command line; None or False where not given."""

PUZZLE_OPTIONS = ("--steps", "--breadth", "--data", "--puzzles", "--draw")
LANGUAGE_OPTIONS = ("--solvers", "--tasks", "--core", "--through", "--tasks-dir", "--tasks-data", "--limit", "--max-per-task")


def is_of_puzzles(run: Path) -> bool:
    """Whether a folder is a run on puzzles. Raises Refusal for a stored recipe that cannot be read."""
    from pretrain.config import read_recipe
    from pretrain.reasoning.config import PuzzleRecipe

    config = run / CONFIG
    return config.is_file() and isinstance(read_recipe(config.read_text(encoding="utf-8"), str(config)), PuzzleRecipe)


def refuse_other_regime(run: Path, options: Options, *, puzzles: bool) -> None:
    """Raises Refusal for options of language models on a run on puzzles, and the reverse."""
    names = [name for name in (LANGUAGE_OPTIONS if puzzles else PUZZLE_OPTIONS) if options[name] not in (None, False)]
    if not names:
        return
    belongs = f"{', '.join(names)} {'belong' if len(names) > 1 else 'belongs'}"
    if puzzles:
        raise Refusal(
            f"{belongs} to language models, and {run} is a run on puzzles. It takes --steps, --solver-iterations, --breadth, --data, "
            "--puzzles, --batch, --internalization and --draw."
        )
    raise Refusal(
        f"{belongs} to runs on puzzles, and {run} is not one. A language model takes --solver-iterations, --internalization, --solvers, "
        "--tasks and --core."
    )


def counts(option: str, text: str | None) -> list[int] | None:
    """`1,4,16` -> [1, 4, 16]. Raises Refusal for anything but numbers from 1."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise Refusal(f"{option} {text} is no list of numbers from 1: write numbers with commas between them, such as 1,4,16.")
    return [int(word) for word in words]


def evaluate_puzzles(run: Path, options: Options, iterations: list[int | str] | None, as_json: bool) -> None:
    """The report that the options ask for. Raises Refusal for options that do not go together."""
    if iterations is not None and "strict" in iterations:
        raise Refusal("--solver-iterations strict is how generation solves, token by token; a puzzle has no such order. Write auto.")
    steps, breadths = counts("--steps", options["--steps"]), counts("--breadth", options["--breadth"])
    internalization, draw, out = options["--internalization"], options["--draw"], options["--out"]
    report = "--internalization" if internalization else "--draw" if draw is not None else None
    if internalization and draw is not None:
        raise Refusal("--internalization and --draw are 2 reports: ask for one at a time.")
    with_draw = [name for name in ("--solver-iterations", "--puzzles", "--batch") if options[name] is not None]
    if draw is not None and with_draw:
        raise Refusal(
            f"{with_draw[0]} does not go with --draw, which draws the model as it is used, on so many puzzles as it says. Leave it out."
        )
    if report and breadths is not None:
        raise Refusal(f"--breadth does not go with {report}: ask for one at a time.")
    if out is not None and report is None:
        raise Refusal("--out goes with --internalization and --draw, which write files. Leave it out, or ask for one of them.")
    common = {"steps": steps, "data": options["--data"]}
    bounds = {"puzzles": options["--puzzles"], "batch": options["--batch"]}
    if internalization:
        deliver(as_json, lambda: _internalization(run, out or run, iterations, common | bounds), show_puzzle_internalization)
    elif draw is not None:
        deliver(as_json, lambda: _pictures(run, out, draw, common), show_pictures)
    else:
        settings = common | bounds | {"iterations": iterations, "breadths": breadths}
        deliver(as_json, lambda: _evaluation(run, settings), show_puzzles)


def _evaluation(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from pretrain.reasoning.report import evaluate_puzzle_run

    with fraction_bar("evaluating") as report:
        return evaluate_puzzle_run(run, **settings, progress=report)


def _internalization(run: Path, out: Path, iterations: list[int | str] | None, settings: dict[str, Any]) -> dict[str, Any]:
    from pretrain.reasoning.internalization import DEPTHS, report_puzzle_internalization

    depths = DEPTHS if iterations is None else [depth for depth in iterations if isinstance(depth, int)]
    with fraction_bar("solving") as report:
        return report_puzzle_internalization(run, out, depths=depths, **settings, progress=report)


def _pictures(run: Path, out: Path | None, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    from pretrain.reasoning.draw import PICTURES, draw_puzzles

    with fraction_bar("drawing") as report:
        return draw_puzzles(run, out or run / PICTURES, count, **settings, progress=report)
