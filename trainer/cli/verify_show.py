"""What `verify` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.runs.verify import Check


def check_table(folder: Path, checks: Sequence[Check]) -> Table:
    """One line for each check."""
    table = Table("check", "", "expected", "found", title=Text(str(folder)), title_justify="left")
    for one in checks:
        cells = (one.what, "good" if one.is_good else "wrong", one.expected, one.found)
        table.add_row(*map(Text, cells), style=None if one.is_good else "bold red")
    return table


def failed_lines(checks: Sequence[Check]) -> Iterator[str]:
    """A line for each check that failed, then one for all."""
    failed = [one for one in checks if not one.is_good]
    for one in failed:
        yield f"wrong: {one.what}: expected {one.expected}, found {one.found}"
    if failed:
        yield f"{len(failed)} of {len(checks)} checks failed"
