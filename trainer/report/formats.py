"""The columns of a table as text, and whole tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence

from trainer.ablation.cells import command
from trainer.base.stats import MOST_SEEDS, Difference
from trainer.report.effects import FactorEffect
from trainer.report.notes import effect_remarks, remarks, warnings
from trainer.report.tables import STATE_TEXTS, CellSummary, Metric, Needed, Table
from trainer.report.test_sizes import REMARK, size_table
from trainer.report.view import (
    COLUMNS,
    DEFAULT_COLUMNS,
    FIELDS,
    View,
    factors_of,
    field_names,
    fields_of,
)

# ---- columns as text, before any format escapes it

_SMALLEST_P = 0.001
_HEADINGS = {
    "p": "p (Holm)",
    "seeds_needed": "seeds needed",
    "published": "published top-1 %",
    "train_s": "train s",
    "images_per_s": "images/s",
    "peak_mem_mib": "peak MiB",
    "num_params": "params M",
    "gmacs": "GMACs",
}


def shown_columns(view: View) -> tuple[str, ...]:
    """The columns asked for; by default those with something in them."""
    if view.columns != DEFAULT_COLUMNS:
        return view.columns
    always = ("cell", "n", "mean")
    return tuple(
        name
        for name in view.columns
        if name in always or any(cell_text(view, summary, name) for summary in view.table.cells)
    )


def is_text(column: str) -> bool:
    """Text, aligned left, or a number? Levels of factors are text."""
    return column in ("group", "cell", "marks", "set") or column not in COLUMNS


def heading_of(view: View, column: str) -> str:
    """The heading of a column, with its unit."""
    if column == "mean":
        return view.table.metric.heading
    if column == "difference":
        return "difference [95 %]" if view.table.num_compared else "difference"
    return _HEADINGS.get(column, column)


def cell_text(view: View, summary: CellSummary, column: str) -> str:
    """One column of a cell's line; empty where there is no value."""
    format_column = _COLUMN_TEXTS.get(column)
    if format_column is None:
        return dict(summary.cell.levels).get(column, "")
    return format_column(summary, view.table.metric)


def format_number(value: float, digits: int, sign: str = "") -> str:
    """A number with so many digits after the point; never -0.00."""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "+" if sign else "") if not text.strip("+-0.") else text


def _n_text(summary: CellSummary, _: Metric) -> str:
    num_values, num_seeds = len(summary.values), len(summary.seeds)
    return str(num_values) if num_values == num_seeds else f"{num_values} of {num_seeds}"


def _mean_text(summary: CellSummary, metric: Metric) -> str:
    if summary.mean is None:
        return ", ".join(dict.fromkeys(STATE_TEXTS[result.state] for result in summary.seeds))
    std = f" ± {format_number(summary.std, metric.digits)}" if summary.std is not None else ""
    return format_number(summary.mean, metric.digits) + std


def _difference_text(summary: CellSummary, metric: Metric) -> str:
    return "base" if summary.cell.is_base else difference_text(summary.difference, metric)


def difference_text(difference: Difference | None, metric: Metric) -> str:
    """Such as `+2.04 [0.95, 3.12]`; without an interval where there is none."""
    if difference is None:
        return ""
    value = format_number(difference.value, metric.digits, sign="+")
    interval = difference.interval
    if interval is None:
        return value
    low, high = (format_number(end, metric.digits) for end in interval)
    return f"{value} [{low}, {high}]"


def p_text(p: float | None) -> str:
    """A p-value to three digits, or what it is below; empty for none."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= _SMALLEST_P else f"<{_SMALLEST_P}"


def _seeds_needed_text(needed: Needed | None) -> str:
    """With ≈ where the spread is borrowed, in brackets by the pooled one."""
    if needed is None:
        return ""
    about = "≈" if needed.origin != "measured" else ""
    pooled = f" ({_num_seeds(needed.pooled_seeds)})" if needed.pooled_std is not None else ""
    return f"{about if needed.num_seeds else ''}{_num_seeds(needed.num_seeds)}{pooled}"


def _num_seeds(num_seeds: int | None) -> str:
    return f"> {MOST_SEEDS:,}" if num_seeds is None else f"{num_seeds:,}"


def _cost_text(
    field: str, unit: float = 1.0, has_range: bool = False
) -> Callable[[CellSummary, Metric], str]:
    """The cost, and with has_range the least and the most, where they differ."""

    def format_cost(summary: CellSummary, _: Metric) -> str:
        if summary.costs is None:
            return ""
        value = _cost_number(getattr(summary.costs, field) / unit)
        low, high = (_cost_number(end / unit) for end in summary.costs.range_of(field))
        return f"{value} ({low}–{high})" if has_range and low != high else value

    return format_cost


def _cost_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_COLUMN_TEXTS: dict[str, Callable[[CellSummary, Metric], str]] = {
    "group": lambda summary, _: summary.cell.group,
    "cell": lambda summary, _: summary.cell.name,
    "n": _n_text,
    "mean": _mean_text,
    "difference": _difference_text,
    "p": lambda summary, _: p_text(summary.p_holm),
    "seeds_needed": lambda summary, _: _seeds_needed_text(summary.needed),
    "published": lambda summary, _: (
        "" if summary.cell.published is None else f"{summary.cell.published:g}"
    ),
    "train_s": _cost_text("train_s", has_range=True),
    "images_per_s": _cost_text("images_per_s"),
    "peak_mem_mib": _cost_text("peak_mem_mib"),
    "num_params": _cost_text("num_params", unit=1e6),
    "gmacs": _cost_text("gmacs"),
    "marks": lambda summary, _: "; ".join(summary.marks),
    "set": lambda summary, _: summary.cell.overrides,
}


# ---- CSV

_CSV_DIGITS = 8  # the last digits of a quantile depend on the machine


def as_csv(view: View) -> str:
    """One line per cell, one column per value with 8 digits, for other programs."""
    names = [*FIELDS, *factors_of(view.table)]
    if not view.is_whole:
        names = field_names(view.columns)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for fields in fields_of(view.table):
        values = (fields[name] for name in names)
        writer.writerow(
            f"{value:.{_CSV_DIGITS}g}" if isinstance(value, float) else value for value in values
        )
    return text.getvalue()


EFFECT_HEADINGS = ("factors", "effect", "n", "difference [95 %]", "p (Holm)")


def effect_texts(effect: FactorEffect, metric: Metric) -> tuple[str, ...]:
    """One effect as text, by EFFECT_HEADINGS."""
    num_seeds = str(effect.difference.num_pairs if effect.difference else 0)
    difference = difference_text(effect.difference, metric)
    return effect.factors, effect.name, num_seeds, difference, p_text(effect.p_holm)


def effects_csv(table: Table) -> str:
    """Main effects and interactions, one a line, for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("group", "factors", "effect", "n", "metric", "difference", "low", "high", "p")
    writer.writerow(names)
    for effect in table.effects:
        one = effect.difference
        num_seeds = one.num_pairs if one else 0
        numbers = (one.value, one.low, one.high) if one else (None,) * 3
        values = (
            f"{x:.{_CSV_DIGITS}g}" if x is not None else "" for x in (*numbers, effect.p_holm)
        )
        about = effect.group, effect.factors, effect.name, num_seeds, table.metric.name
        writer.writerow([*about, *values])
    return text.getvalue()


# ---- Markdown


def as_markdown(view: View) -> str:
    """A document: question, tables, warnings, remarks, the user's notes, rows and commands."""
    table = view.table
    parts = [
        f"<!-- Generated by make table ablation={table.word} from the ablation file, its rows and "
        f"{table.name}.notes.md: edit those. -->",
        f"# {markdown_text(table.title)}",
        table.question.strip(),
        f"Source: {table.source}" if table.source else "",
        *_markdown_tables(view),
        "\n".join(f"**Warning:** {markdown_text(line)}\n" for line in warnings(table)).strip(),
        "\n".join(f"- {markdown_text(line)}" for line in remarks(table, shown_columns(view))),
        *_markdown_effects(table),
        *_markdown_sizes(table),
        table.notes,
        f"## Rows\n\n{_markdown_rows(view)}",
        f"## Commands\n\nAll runs: `make ablate ablation={table.word}`. One run of each cell:",
        _commands(table.cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_tables(view: View) -> list[str]:
    columns, parts = shown_columns(view), []
    headings = [
        markdown_text(name) if is_text(name) else heading_of(view, name) for name in columns
    ]
    rule = "|" + "|".join("---" if is_text(name) else "---:" for name in columns) + "|"
    for group, cells in view.table.groups.items():
        if len(view.table.groups) > 1:
            parts.append(f"## {markdown_text(group)}")
        lines = ((_markdown_cell(view, summary, name) for name in columns) for summary in cells)
        parts.append("\n".join([_markdown_line(headings), rule, *map(_markdown_line, lines)]))
    return parts


def _markdown_effects(table: Table) -> list[str]:
    parts = ["## Main effects and interactions"] if table.effects else []
    for group in dict.fromkeys(effect.group for effect in table.effects):
        if len(table.groups) > 1:
            parts.append(f"### {markdown_text(group)}")
        lines = [_markdown_line(EFFECT_HEADINGS), "|---|---|---:|---:|---:|"]
        for effect in table.effects:
            if effect.group == group:
                factors, name, *numbers = effect_texts(effect, table.metric)
                lines.append(
                    _markdown_line([markdown_text(factors), markdown_text(name), *numbers])
                )
        parts.append("\n".join(lines))
    parts += ["\n".join(f"- {line}" for line in effect_remarks(table))] if parts else []
    return parts


def _markdown_sizes(table: Table) -> list[str]:
    found = size_table(table)
    if found is None:
        return []
    lines = [_markdown_line(found.headings), "|---" + "|---:" * len(found.sizes) + "|"]
    for line in found.lines:
        group = f" ({line.group})" if len(table.groups) > 1 else ""
        lines.append(_markdown_line([markdown_text(f"{line.cell}{group}"), *line.texts]))
    return ["## At other image sizes", "\n".join(lines), f"- {markdown_text(REMARK)}"]


def _markdown_cell(view: View, summary: CellSummary, column: str) -> str:
    text = cell_text(view, summary, column)
    if column == "set":
        return markdown_code(text)
    return markdown_text(text) if is_text(column) else text


def _markdown_rows(view: View) -> str:
    table, metric = view.table, view.table.metric
    lines = [f"| cell | seed | {metric.heading} | run |", "|---|---:|---:|---|"]
    for summary in table.cells:
        group = "" if len(table.groups) == 1 else f" ({summary.cell.group})"
        name = markdown_text(f"{summary.cell.name}{group}")
        for result in summary.seeds:
            score = STATE_TEXTS[result.state]
            if result.value is not None:
                score = format_number(result.value, metric.digits)
            run = markdown_code(result.row.run) if result.row else ""
            lines.append(_markdown_line([name, str(result.seed), score, run]))
    return "\n".join(lines)


def _commands(cells: Sequence[CellSummary]) -> str:
    lines = []
    for summary in cells:
        lines.append(f"# {' '.join(summary.cell.name.split())}")
        lines.append(command(summary.cell, summary.seeds[0].seed))
    text = "\n".join(lines)
    fence = _backticks(text, at_least=3)
    return f"{fence}sh\n{text}\n{fence}"


def _markdown_line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too."""
    text = re.sub(r"[\\`*\[\]<>|~]", lambda char: f"\\{char[0]}", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def markdown_code(text: str) -> str:
    """Text as code, on one line, in a table too; empty for none."""
    text = " ".join(text.split()).replace("|", r"\|")
    if "`" not in text:
        return f"`{text}`" if text else ""
    fence = _backticks(text, at_least=1)
    return f"{fence} {text} {fence}"


def _backticks(text: str, at_least: int) -> str:
    """A fence longer than any run of backticks in the text (CommonMark 0.31, 4.5 and 6.1)."""
    return "`" * max(at_least, 1 + max(map(len, re.findall("`+", text)), default=0))
