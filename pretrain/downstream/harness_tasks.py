"""`attractor evaluate --tasks`: lm-eval's tasks on a run or an export, by our class or by lm-eval's `hf`, and its results in a file.

    RUN/lm_eval/<UTC time>-<tasks>.json        lm-eval's own results, and under "attractor" what was asked of which model

An export keeps its results in the same place inside itself. A file is never replaced. Tasks come from this package (tasks/), from
--tasks-dir and from lm-eval, the first two without the seconds that a walk through lm-eval's 14,000 takes. Standard errors that have no
closed form are bootstrapped with 1,000 resamples (lm-eval: 100,000), in this process. No torch import at the top.

Refused before the model is loaded: lm-eval not installed, unknown tasks, task data that cannot be had.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pretrain import durable
from pretrain.errors import Refusal
from pretrain.run_folder import CONFIG, dump

FOLDER = "lm_eval"
OWN_TASKS = Path(__file__).with_name("tasks")
_RESAMPLES = 1000
_LONGEST_NAME = 80

logger = logging.getLogger(__name__)


def evaluate_tasks(
    path: Path,
    names: Sequence[str],
    *,
    through: str = "attractor",
    tasks_dir: Path | None = None,
    tasks_data: Path | None = None,
    limit: int | None = None,
    batch: int | None = None,
    solver_iterations: int | str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """{"path", "through", ..., "file", "cut", "rows": [as `rows_of` makes them]}; written to `out` or inside `path`.

    `through` is "attractor" or "hf", `limit` documents a task at most. Raises Refusal.
    """
    if find_spec("lm_eval") is None:
        raise Refusal("Tasks are run by lm-eval, which is not installed here: pip install 'attractor[eval]'.")
    if through == "hf" and (path / CONFIG).is_file():
        raise Refusal(
            f"{path} is a run folder, which transformers cannot read: `attractor export {path} --out DIR` writes one that it can. Give "
            "that folder."
        )
    _settle()
    with contextlib.redirect_stdout(io.StringIO()):  # lm-eval and datasets print as they go
        manager = _manager(names, tasks_dir, tasks_data)
        tasks = _loaded(manager, names)
        model = _model(path, through, batch, solver_iterations)
        from lm_eval import simple_evaluate

        results = simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False, batch_size=batch
        )
    asked = {"path": str(path), "through": through, "solver_iterations": solver_iterations, "limit": limit, "tasks": list(names)}
    asked |= {"cut": model.cut}
    results["attractor"] = asked
    file = _write(out or path / FOLDER, names, results)
    return {**asked, "file": None if file is None else str(file), "rows": rows_of(results)}


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a task and metric: a group, then its tasks one `depth` deeper. A group's n is the sum of its tasks'."""
    found = []
    values = {**results["results"], **results.get("groups", {})}
    for task, depth in _ordered(values, results["group_subtasks"]):
        alias = values[task].get("alias", task).removeprefix(" ").removeprefix("- ")
        for key, value in values[task].items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values[task].get(f"{metric}_stderr,{chosen}")
            about = {"task": task, "alias": alias.strip(), "depth": depth, "metric": metric if chosen == "none" else f"{metric} ({chosen})"}
            stderr = float(error) if isinstance(error, (int, float)) else None
            found.append({**about, "value": float(value), "stderr": stderr, "n": _size(task, results)})
    return found


def _ordered(tasks: Iterable[str], groups: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(name, depth) of what was run, members after their group."""
    members = {name for children in groups.values() for name in children}

    def walk(name: str, depth: int) -> Iterator[tuple[str, int]]:
        yield name, depth
        for child in groups.get(name, []):
            yield from walk(child, depth + 1)

    for name in tasks:
        if name not in members:
            yield from walk(name, 0)


def _size(task: str, results: dict[str, Any]) -> int:
    """Documents of a task, or of all tasks of a group."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_size(child, results) for child in results["group_subtasks"][task])


def _settle() -> None:
    """Quiets what lm-eval stands on, and keeps it off a network that is not there; before anything imports it."""
    settings = {"TOKENIZERS_PARALLELISM": "false", "DISABLE_MULTIPROC": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings |= {"TQDM_DELAY": "2"} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}  # no bar for what is soon done
    if not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from pretrain.runtime import device_of, settle_libraries  # torch imports tqdm, which reads its settings then

    settle_libraries(device_of("auto"))
    for name in ("lm_eval", "huggingface_hub", "datasets", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import lm_eval.evaluator

    datasets.disable_progress_bars()
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the folder one stands in, or git's complaint that it has none


def _reachable(address: str) -> bool:
    """Whether the host's name is known here; asked once, where the libraries would try for half a minute."""
    try:
        socket.getaddrinfo(urlparse(address).hostname, None)
    except OSError:
        return False
    return True


def _manager(names: Sequence[str], tasks_dir: Path | None, tasks_data: Path | None) -> Any:
    """lm-eval's TaskManager that knows all the names. Raises Refusal for one that nobody knows."""
    from lm_eval.tasks import TaskManager

    if tasks_dir is not None and not tasks_dir.is_dir():
        raise Refusal(f"--tasks-dir {tasks_dir} is no folder: give the one that holds the tasks' YAML files.")
    folders = [OWN_TASKS, *([tasks_dir] if tasks_dir is not None else [])]
    metadata = {} if tasks_data is None else {"tasks_data": str(tasks_data)}
    near = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(name in near.task_index for name in names):
        return near
    manager = TaskManager(include_path=folders, metadata=metadata)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 5, 0.6)
            hint = f"Names near it: {', '.join(close)}" if close else "`lm-eval ls tasks` lists lm-eval's"
            raise Refusal(f"There is no task `{name}`. {hint}; files of your own are named with --tasks-dir.")
    return manager


def _loaded(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks with their data. Raises Refusal for data that cannot be had."""
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except OSError as error:  # `datasets` and the hub raise its kinds
            raise Refusal(
                f"The data of task `{name}` cannot be had here ({str(error).splitlines()[0]}). Run the task once where there is a network "
                "and bring that HF_HOME here, or use a task file that reads local data (--tasks-dir); local_lambada and local_blimp do."
            ) from error
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else list(loaded["tasks"].values())
    return found


def _model(path: Path, through: str, batch: int | None, solver_iterations: int | str | None) -> Any:
    if through == "hf":
        from pretrain.downstream.harness_hf import ExportLM
        from pretrain.runtime import device_of

        return ExportLM(str(path), solver_iterations, batch_size=batch or 16, device=device_of("auto").type)
    from pretrain.downstream.harness import AttractorLM

    return AttractorLM(str(path), solver_iterations, batch_size=batch)


def _write(folder: Path, names: Sequence[str], results: dict[str, Any]) -> Path | None:
    """The file; None, with a warning, where the disk refuses: the figures are worth more than their copy."""
    from lm_eval.utils import handle_non_serializable

    tasks = "+".join(Path(name).stem for name in names)[:_LONGEST_NAME]
    file = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{tasks}.json"
    text = dump(json.loads(json.dumps(results, default=handle_non_serializable)), indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(file, text + "\n")
    except OSError as error:
        logger.warning("%s could not be written: %s", file, error.strerror)
        return None
    return file
