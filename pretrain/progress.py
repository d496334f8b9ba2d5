"""What a person sees while a run trains: a progress bar on a terminal, one compact line a logged step elsewhere (logs, pipes).

Progress counts tokens, since the budget does. The time left is the tokens left over the mean rate of late (each new rate counts 1/10).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

SMOOTHING = 0.1


class Progress:
    """`update` with each logged record, `note` for a sentence, `close` at the end. With enabled=False (other ranks) nothing is shown."""

    def __init__(self, total_tokens: int, *, tokens: int = 0, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.total_tokens = total_tokens
        self._rate: float | None = None
        self._enabled = enabled
        self._stream = stream or sys.stdout
        self._bar: RichProgress | None = None
        if enabled and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.fields[text]}"), console=Console(file=self._stream)
            )
            self._task = self._bar.add_task("", total=total_tokens, completed=tokens, step=0, text="")
            self._bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows one record: step and tokens; loss, tokens_per_second and solver_iterations where it has them."""
        if not self._enabled:
            return
        if rate := record.get("tokens_per_second"):
            self._rate = rate if self._rate is None else self._rate + SMOOTHING * (rate - self._rate)
        text = self._text(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["tokens"], step=record["step"], text=text)
        else:
            print(f"step {record['step']}  {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A sentence above the bar, or a line of its own."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _text(self, record: Mapping[str, Any]) -> str:
        parts = [f"{short(record['tokens'])}/{short(self.total_tokens)} tokens"]
        if (loss := record.get("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (iterations := record.get("solver_iterations")) is not None:
            parts.append(f"iterations {iterations:.3g}")
        if self._rate:
            parts += [f"{short(self._rate)} tokens/s", f"left {clock((self.total_tokens - record['tokens']) / self._rate)}"]
        return "  ".join(parts)


def short(number: float) -> str:
    """A count in three digits or so: 950, 12.3k, 4.56M, 2.00B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, hours and minutes, or days and hours."""
    whole = max(0, round(seconds))
    if whole >= 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s"
