"""Doctor's findings as a Rich table: in a file of its own, as Rich itself may be broken."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from trainer.base.terminal import open_terminal
from trainer.tools.doctor_finding import ABSENT, BROKEN, GOOD, Finding, cells_of

_HEADINGS = ("what", "found", "wanted", "", "mended by")
_STYLES = {GOOD: None, ABSENT: "yellow", BROKEN: "bold red"}


def print_findings(
    findings: Sequence[Finding], warning: str | None, verdict: str, style: str
) -> None:
    """The findings on the terminal, each in its colour, then the warning and the verdict."""
    out = open_terminal(160)
    out.print(table_of(findings), soft_wrap=False)
    if warning:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    out.print(verdict, style=style, markup=False)


def table_of(findings: Sequence[Finding]):
    """The findings as a Rich table."""
    table = Table(*_HEADINGS)
    for one in findings:
        table.add_row(*map(Text, cells_of(one)), style=_STYLES[one.state])
    return table
