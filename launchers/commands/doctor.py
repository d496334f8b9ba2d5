"""`attractor doctor`: the findings of launchers/doctor.py as a table or JSON; exit code 1 when something required is missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from launchers.output import console, deliver

EPILOG = """\
[bold]Examples[/]

  attractor doctor

  attractor doctor --json
"""

UNHEALTHY = 1
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}


def command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False) -> None:
    """Check this machine and installation; say what is wrong and how to mend it.

    Python, packages against their bounds, torch, accelerators, memory, disk. Exit code 0 unless something required is missing (then 1).
    """
    report = deliver(as_json, _report, _show)
    if not report["healthy"]:
        raise typer.Exit(UNHEALTHY)


def _report() -> dict[str, Any]:
    from launchers.doctor import examine

    findings = examine()
    return {"healthy": all(finding.level != "missing" for finding in findings), "findings": [asdict(finding) for finding in findings]}


def _show(report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "", "found"):
        table.add_column(column)
    for finding in report["findings"]:
        remedy = f"\n[yellow]{escape(finding['remedy'])}[/]" if finding["remedy"] else ""
        table.add_row(finding["check"], _MARKS[finding["level"]], escape(finding["found"]) + remedy)
    out = console()
    out.print(table)
    out.print("Everything required is here." if report["healthy"] else "[bold red]Something required is missing: see its remedy.[/]")
