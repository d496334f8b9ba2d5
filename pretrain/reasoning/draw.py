"""Pictures of a reasoner at work: a PNG a puzzle, its panels the puzzle, the prediction after some supervision steps, the answer.

    Sudoku    given cells grey, predicted digits blue where right, red on pink where wrong, box lines heavy
    maze      walls black, start and goal green and purple; of the path: blue where right, red where it should not be, orange where it is
              missing; a wall, opening, start or goal that is predicted as something else is red too

A maze's prediction is compared with the answer that the set has; the title says so where it marks another path that is as short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.puzzles import PuzzleBatch, PuzzleManifest
from data_pipeline.puzzles.games import BLANK, GOAL, MAZE, PATH, START, WALL
from pretrain.errors import Refusal
from pretrain.reasoning.evaluate import spread, valid_by_step
from pretrain.reasoning.loaded import load_puzzle_run, puzzle_recipe_of, puzzles_for
from pretrain.reasoning.report import asked_of, batch_of
from pretrain.reasoning.traces import Traces, trace
from pretrain.runtime import device_of, settle_libraries

PICTURES = "pictures"
STEPS = (1, 2, 4, 8, 16)
Grid = NDArray[np.uint8]

_WHITE, _GREY, _PINK = (1.0, 1.0, 1.0), (0.87, 0.87, 0.87), (1.0, 0.80, 0.78)
_BLACK, _BLUE, _RED, _ORANGE = (0.15, 0.15, 0.17), (0.25, 0.50, 0.85), (0.86, 0.15, 0.15), (1.0, 0.72, 0.30)
_GREEN, _PURPLE = (0.10, 0.62, 0.30), (0.55, 0.25, 0.70)


def draw_puzzles(
    run: Path,
    out: Path,
    count: int,
    *,
    steps: Sequence[int] | None = None,
    data: str | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Draws `count` puzzles, evenly spread over the validation split, after each of `steps` (None: 1, 2, 4, 8, 16 as far as the model was
    trained) into OUT/<game>-<row>.png. Returns {"files": [...], "puzzles": [{row, rating, exact, halting_steps}]}.

    Raises Refusal as `evaluate_puzzle_run`, and where OUT cannot be written.
    """
    recipe = puzzle_recipe_of(run)
    trained = recipe.supervision.steps
    shown = asked_of(run, recipe, steps).steps if steps else sorted({*(step for step in STEPS if step <= trained)})
    settle_libraries(device_of("auto"))
    puzzle_set = puzzles_for(recipe, data)
    loaded = load_puzzle_run(run)
    puzzles, manifest = puzzle_set.batch(spread(len(puzzle_set), count)), puzzle_set.manifest
    last = max(trained, shown[-1])
    traces = trace(loaded.model, puzzles, last, loaded.device, batch=batch_of(recipe), keep=shown)
    titles = _titles(traces, puzzles, manifest, shown)
    files, about = [], []
    for number, title in enumerate(titles):
        grids = [traces.answers[step][number].numpy() for step in shown]
        file = out / f"{manifest.game}-{int(puzzles.index[number]):06d}.png"
        _write(file, title, puzzles.inputs[number].numpy(), grids, puzzles.answers[number].numpy(), shown, manifest)
        files.append(str(file))
        found = {"row": int(puzzles.index[number]), "rating": int(puzzles.ratings[number])}
        found |= {"exact": bool(traces.exact[number, shown[-1] - 1]), "halting_steps": int(traces.halting_steps()[number])}
        about.append(found)
        progress((number + 1) / len(titles))
    return {"files": files, "puzzles": about}


def _titles(traces: Traces, puzzles: PuzzleBatch, manifest: PuzzleManifest, shown: Sequence[int]) -> list[str]:
    """A line on each puzzle: what it is, whether the last grid drawn is right, when the halting head would have stopped."""
    last, titles = shown[-1], []
    valid = valid_by_step(traces, puzzles, manifest)
    halting, halts = traces.halting_steps().tolist(), traces.stop.any(dim=1).tolist()
    for number, (row, rating) in enumerate(zip(puzzles.index.tolist(), puzzles.ratings.tolist(), strict=True)):
        outcome = "exact" if traces.exact[number, last - 1] else "not exact"
        if manifest.game == MAZE and valid[last][number] and outcome == "not exact":
            outcome += ", but a shortest path"
        stops = f"halts at step {halting[number]}" if halts[number] else f"does not halt in {traces.steps} steps"
        difficulty = f"shortest path of {rating} steps" if manifest.game == MAZE else f"rating {rating}"
        size = f"{manifest.height}x{manifest.width}"
        titles.append(f"{manifest.game} {size}, puzzle {row}, {difficulty}: after step {last} {outcome}; {stops}")
    return titles


def _write(
    file: Path, title: str, puzzle: Grid, grids: Sequence[Grid], answer: Grid, steps: Sequence[int], manifest: PuzzleManifest
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panel = _maze if manifest.game == MAZE else _sudoku
    side = 3.0 if manifest.width > 12 else 2.2
    panels = [("puzzle", puzzle), *((f"step {step}", grid) for step, grid in zip(steps, grids, strict=True)), ("answer", answer)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(side * len(panels), side + 0.75), layout="constrained")
    for axis, (name, grid) in zip(axes, panels, strict=True):
        panel(axis, grid, puzzle, answer, manifest)
        axis.set_title(name if name in ("puzzle", "answer") else f"{name}: {_count(grid, answer)}", fontsize=10)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    _legend(figure, manifest)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=140)
    except OSError as error:
        raise Refusal(f"The picture {file} cannot be written: {error.strerror}. Give another folder with --out.") from error
    finally:
        pyplot.close(figure)


def _count(grid: Grid, answer: Grid) -> str:
    wrong = int((grid != answer).sum())
    return "exact" if wrong == 0 else f"{wrong} of {len(answer)} wrong"


def _legend(figure: Any, manifest: PuzzleManifest) -> None:
    from matplotlib.patches import Patch

    maze = [(_BLUE, "path"), (_RED, "wrong"), (_ORANGE, "path missing"), (_GREEN, "start"), (_PURPLE, "goal")]
    named = maze if manifest.game == MAZE else [(_GREY, "given"), (_WHITE, "right (blue)"), (_PINK, "wrong (red)")]
    handles = [Patch(facecolor=colour, edgecolor="0.5", linewidth=0.5, label=label) for colour, label in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(named), frameon=False, fontsize=9)


def _sudoku(axis: Any, grid: Grid, puzzle: Grid, answer: Grid, manifest: PuzzleManifest) -> None:
    size, (box_height, box_width) = manifest.width, manifest.box or (1, 1)
    given, blank = puzzle > BLANK, grid == BLANK
    right = (grid == answer) | (grid is puzzle)  # what the puzzle leaves open is not wrong
    colours = np.where(right[:, None], np.where(given[:, None], _GREY, _WHITE), _PINK)
    axis.imshow(colours.reshape(size, size, 3), extent=(0, size, size, 0), interpolation="nearest")
    for place in np.flatnonzero(~blank).tolist():
        colour = "black" if given[place] and right[place] else (_BLUE if right[place] else _RED)
        row, column = divmod(place, size)
        digit = str(int(grid[place]) - BLANK) if grid[place] > BLANK else "?"
        weight = "normal" if right[place] else "bold"
        axis.text(column + 0.5, row + 0.54, digit, ha="center", va="center", fontsize=90 / size, color=colour, weight=weight)
    for line in range(size + 1):
        axis.axhline(line, color="black", linewidth=1.6 if line % box_height == 0 else 0.4)
        axis.axvline(line, color="black", linewidth=1.6 if line % box_width == 0 else 0.4)
    axis.set(xlim=(-0.06, size + 0.06), ylim=(size + 0.06, -0.06), frame_on=False)


def _maze(axis: Any, grid: Grid, puzzle: Grid, answer: Grid, manifest: PuzzleManifest) -> None:
    colours = np.tile(np.array(_WHITE), (len(grid), 1))
    for token, colour in ((WALL, _BLACK), (START, _GREEN), (GOAL, _PURPLE), (PATH, _BLUE)):
        colours[grid == token] = colour
    if grid is not puzzle:
        colours[grid != answer] = _RED
        colours[(answer == PATH) & (grid != PATH)] = _ORANGE
    axis.imshow(colours.reshape(manifest.height, manifest.width, 3), interpolation="nearest")
    for token, colour in ((START, _GREEN), (GOAL, _PURPLE)):  # ringed: at 30x30 a cell is easily overlooked
        row, column = divmod(int((puzzle == token).argmax()), manifest.width)
        axis.plot(column, row, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.8, clip_on=False)
    for spine in axis.spines.values():
        spine.set(color="0.5", linewidth=0.8)
