"""What a run tells: the record, metrics.jsonl and evaluations.jsonl, and its mirrors in TensorBoard and wandb.

The record is written first and must succeed. A mirror may not stop or delay training: it starts in a thread that is given
`START_SECONDS`, and at its first failure it is switched off with one warning. So wandb in online mode with no server costs a run a
few seconds and a line. wandb's run id is ours to choose and is kept in the checkpoint, so a resumed online run continues under it;
offline runs cannot be continued, a resumed one is a further offline run with the same id, which `wandb sync --append` joins.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pretrain.run_folder import RunFolder

START_SECONDS = 20.0
CLOSE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Another place where numbers are shown."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Telemetry:
    """Every rank makes one; only the rank that writes the folder has a record and mirrors.

    `state` is what `state_dict` gave at the checkpoint resumed from (or empty), `step` that checkpoint's step. `config` is shown by wandb.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        tensorboard: bool = False,
        wandb: str = "off",
        project: str = "attractor",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._folder = folder
        resumed = (state or {}).get("wandb_id")
        self._wandb_id = resumed or (secrets.token_hex(4) if wandb != "off" else None)
        self._mirrors: dict[str, Mirror] = {}
        if not folder.writes:
            return
        if tensorboard:
            self._start("TensorBoard", lambda: TensorBoardMirror(folder.path / "tensorboard", step), start_seconds)
        if wandb != "off":
            if resumed and wandb == "offline":
                logger.warning("wandb: offline runs cannot be continued; `wandb sync --append` joins this one to run %s", resumed)
            settings = {"project": project, "name": name, "id": self._wandb_id, "config": dict(config or {}), "mode": wandb}
            self._start("wandb", lambda: WandbMirror(folder.path, settings, start_seconds), start_seconds)

    def log(self, record: Mapping[str, Any]) -> None:
        """One logged training step. Raises RunStopped (code 5) when the record cannot be written."""
        self._folder.metrics.append(record)
        self._mirror(record, "")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation; its numbers get the prefix `evaluation/` in the mirrors."""
        self._folder.evaluations.append(record)
        self._mirror(record, "evaluation/")

    def state_dict(self) -> dict[str, Any]:
        """What the next start needs, plain JSON: wandb's run id."""
        return {"wandb_id": self._wandb_id} if self._wandb_id else {}

    def close(self) -> None:
        """Ends the mirrors; one that does not end in time is left behind."""
        for name in list(self._mirrors):
            mirror = self._mirrors.pop(name)
            try:
                bounded(mirror.close, CLOSE_SECONDS, name)
            except Exception as error:  # a mirror is never fatal
                logger.warning("%s did not close: %s. The record in %s is whole.", name, _line(error), self._folder.path)

    def _start(self, name: str, make: Callable[[], Mirror], seconds: float) -> None:
        try:
            self._mirrors[name] = bounded(make, seconds, name)
        except Exception as error:  # a mirror is never fatal
            logger.warning(
                "%s is switched off, it could not start: %s. Training goes on; the record is in %s.", name, _line(error), self._folder.path
            )

    def _mirror(self, record: Mapping[str, Any], prefix: str) -> None:
        numbers = {prefix + key: value for key, value in _flat_numbers(record).items() if key != "step"}
        for name in list(self._mirrors):
            try:
                self._mirrors[name].log(numbers, int(record["step"]))
            except Exception as error:  # a mirror is never fatal
                del self._mirrors[name]
                logger.warning(
                    "%s is switched off, it failed: %s. Training goes on; the record is in %s.", name, _line(error), self._folder.path
                )


class TensorBoardMirror:
    """Event files in RUN/tensorboard. On a resume what was shown after `step` is hidden."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbMirror:
    """A wandb run with files in RUN/wandb, silent on the terminal."""

    def __init__(self, path: Path, settings: Mapping[str, Any], seconds: float) -> None:
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=seconds / 2,
            login_timeout=seconds / 2,
            finish_timeout=CLOSE_SECONDS,
        )
        wandb.setup(quiet)  # or the login speaks before `init` has read the settings
        self._run = wandb.init(dir=str(path), resume="allow" if settings["mode"] == "online" else None, settings=quiet, **settings)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def bounded(work: Callable[[], Any], seconds: float, name: str) -> Any:
    """The result of `work`, run in a thread; TimeoutError if that takes longer: the thread is then left, and dies with the process."""
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:  # handed over, raised below
            answer.put((None, error))

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise RuntimeError(_line(error)) from error
    return result


def _line(error: BaseException) -> str:
    """An error as one line."""
    said = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split()).rstrip(".")


def _flat_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record by path (`loss/auto`); what is no number is left to the record."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            numbers.update(_flat_numbers(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers
