"""What the command line prints: results on standard output, everything else on standard error.

With --json, standard output carries one JSON document and nothing else, whatever libraries print meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def console() -> Console:
    """Where results for people go."""
    return Console()


def error_console() -> Console:
    """Where errors, notes and progress go."""
    return Console(stderr=True)


def print_error(message: str) -> None:
    """One paragraph on standard error, led by a red 'error'."""
    error_console().print(Text("error: ", style="bold red") + Text(_printable(message)), soft_wrap=True)


def print_note(message: str) -> None:
    """One paragraph on standard error that is no error."""
    error_console().print(Text(_printable(message)), soft_wrap=True)


def _printable(message: str) -> str:
    """With control characters spelt out: names out of a stranger's file must not reach the terminal as commands."""
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in message)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Sends what is printed inside to standard error, from Python and from below it (file descriptor 1) alike."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def deliver(as_json: bool, compute: Callable[[], Any], show: Callable[[Any], None]) -> Any:
    """Computes, then shows the result: as one JSON document, or by `show` for people. Returns it."""
    if not as_json:
        value = compute()
        show(value)
        return value
    with quiet_stdout():
        value = compute()
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    return value


@contextlib.contextmanager
def fraction_bar(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, moved by calls with the share done (0 to 1); nothing where there is no terminal."""
    out = error_console()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: si(1.0835e9, "FLOP") -> '1.08 GFLOP'."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}" if abs(value) < 999.5 * factor else f"{value / factor:.0f} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def size(value: float) -> str:
    """Bytes in three digits with a binary prefix: size(1.5 * 2**30) -> '1.5 GiB'."""
    for factor, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}" if value < 999.5 * factor else f"{value / factor:.0f} {prefix}"
    return f"{value:.0f} B"
