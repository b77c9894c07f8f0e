"""The table of `make doctor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from trainer.base.terminal import open_terminal


def print_table(
    rows: Sequence[Sequence[str]],
    styles: Sequence[str | None],
    lines: Iterable[tuple[str, str]],
) -> None:
    """Rows of cells, each in its style; then lines, (text, style)."""
    table = Table("what", "found", "wanted", "", "mended by")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*map(Text, row), style=style)
    out = open_terminal(160)
    out.print(table, soft_wrap=False)
    for line, style in lines:
        out.print(line, style=style, markup=False)
