"""A table as Markdown and as CSV; table_latex has the third format, table_show the terminal's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.ablation.cells import command
from trainer.report.query import View, field_names, frame_of
from trainer.report.table_notes import remarks, warnings
from trainer.report.table_texts import (
    STATE_WORDS,
    heading_of,
    is_text,
    number,
    shown_columns,
    text_of,
)
from trainer.report.tables import CellSummary

_CSV_DIGITS = "%.8g"  # the last digits of a quantile are the machine's, not the study's


def as_markdown(view: View) -> str:
    """A page of its own: question, tables, warnings, remarks, the user's notes, every row, every command."""
    table = view.table
    parts = [
        f"<!-- Rendered by make table ablation={table.name} from its page, its rows and {table.name}.notes.md: change those. -->",
        f"# {markdown_text(table.title)}",
        table.question.strip(),
        f"Source: {table.source}" if table.source else "",
        *_markdown_tables(view),
        "\n".join(f"**Warning:** {markdown_text(line)}\n" for line in warnings(table)).strip(),
        "\n".join(f"- {markdown_text(line)}" for line in remarks(table)),
        table.notes,
        f"## Rows\n\n{_markdown_rows(view)}",
        f"## Commands\n\nAll of it: `make ablate ablation={table.name}`. One run of each cell:\n\n{_commands(table.cells)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_tables(view: View) -> list[str]:
    columns, parts = shown_columns(view), []
    for group, cells in view.table.groups.items():
        if len(view.table.groups) > 1:
            parts.append(f"## {markdown_text(group)}")
        lines = [
            _line(
                markdown_text(column) if is_text(column) else heading_of(view, column)
                for column in columns
            ),
            "|" + "|".join("---" if is_text(column) else "---:" for column in columns) + "|",
        ]
        for one in cells:
            lines.append(_line(_markdown_cell(view, one, column) for column in columns))
        parts.append("\n".join(lines))
    return parts


def _markdown_cell(view: View, one: CellSummary, column: str) -> str:
    text = text_of(view, one, column)
    if column == "set":
        return markdown_code(text)
    return markdown_text(text) if is_text(column) else text


def _markdown_rows(view: View) -> str:
    metric = view.table.metric
    lines = [f"| cell | seed | {metric.heading} | run |", "|---|---:|---:|---|"]
    for one in view.table.cells:
        for result in one.seeds:
            value = (
                number(result.value, metric.digits)
                if result.value is not None
                else STATE_WORDS[result.state]
            )
            run = markdown_code(result.row.run) if result.row else ""
            name = (
                one.cell.name
                if len(view.table.groups) == 1
                else f"{one.cell.name} ({one.cell.group})"
            )
            lines.append(_line([markdown_text(name), str(result.seed), value, run]))
    return "\n".join(lines)


def _commands(cells: Sequence[CellSummary]) -> str:
    lines = []
    for one in cells:
        lines += [f"# {' '.join(one.cell.name.split())}", command(one.cell, one.seeds[0].seed)]
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _line(texts) -> str:
    return f"| {' | '.join(texts)} |"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too."""
    text = re.sub(r"[\\`*\[\]<>|~]", lambda mark: f"\\{mark[0]}", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def markdown_code(text: str) -> str:
    """Text as code, on one line, in a table too; empty for none."""
    text = " ".join(text.split()).replace("|", r"\|")
    if "`" not in text:
        return f"`{text}`" if text else ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def as_csv(view: View) -> str:
    """One line for each cell, a field for each number, in full: for other programs."""
    frame = frame_of(view.table)
    if view.columns and not view.is_whole:
        frame = frame[field_names(view.columns)]
    return frame.to_csv(index=False, lineterminator="\n", float_format=_CSV_DIGITS)
