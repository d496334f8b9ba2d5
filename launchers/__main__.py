"""`python -m launchers` is the `attractor` command."""

from __future__ import annotations

from launchers.cli import main

if __name__ == "__main__":
    main()
