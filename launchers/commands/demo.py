"""`attractor demo`: text, tokenizer, shards, two models, one table; wired here, written in launchers/demo.py."""

from __future__ import annotations

EPILOG = """\
[bold]Example[/]

  attractor demo
"""


def command() -> None:
    """Train a small Attractor and a Transformer on Python's own documentation, and compare them. Takes minutes."""
    from launchers.demo import demo

    demo()
