"""The one exception for bad input: its message is a paragraph for the user, never a traceback."""

from __future__ import annotations


class Refusal(Exception):
    """Bad input, found before anything was touched. The message says what, where, and how to mend it; exit code 2."""
