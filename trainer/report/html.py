"""The report of an ablation: one HTML file that opens from disk, results/<ablation>.html.

It loads nothing and runs nothing but its own style and script, named by their digests in its
Content-Security-Policy, whatever a row or a note contains; the template escapes every text. It
depends on no clock: same rows, same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from trainer.ablation.cells import command
from trainer.base.disk import write_atomically
from trainer.report import curve_figures, figures
from trainer.report.answer import answer
from trainer.report.curves import Curves, find_curves, keep_curves
from trainer.report.formats import (
    EFFECT_HEADINGS,
    cell_text,
    effect_texts,
    format_number,
    heading_of,
    is_text,
    shown_columns,
)
from trainer.report.notes import ROW_FACTS, effect_remarks, remarks, warnings
from trainer.report.rows import Stores, folders_of
from trainer.report.tables import STATE_TEXTS, CellSummary, SeedResult, Table
from trainer.report.test_sizes import REMARK as SIZES_REMARK
from trainer.report.test_sizes import size_table
from trainer.report.view import COST_COLUMNS, View, fields_of, make_view
from trainer.runs.results import rows_folder

ASSETS = Path(__file__).parent / "assets"
# Code points that HTML forbids (spec: noncharacters, surrogates, controls but tab and newline).
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def store_report(results: Stores, table: Table) -> list[Path]:
    """Write a table's report and the curves in it into the first store; nothing where no run has a
    row yet.
    """
    if not any(summary.rows for summary in table.cells):
        return []
    stores = folders_of(results)
    curves = find_curves(stores, table)
    path = stores[0] / f"{table.name}.html"
    curves_file = keep_curves(stores[0], table, curves)
    elsewhere = {
        row.run: quote(Path(os.path.relpath(rows_folder(store), stores[0])).as_posix())
        for store in stores[::-1]
        for summary in table.cells
        for row in summary.rows
        if (rows_folder(store) / f"{row.run}.json").exists()
    }
    write_atomically(path, as_html(table, curves, elsewhere).encode())
    return [path, *([curves_file] if curves_file else [])]


def as_html(
    table: Table, curves: Mapping[str, Curves], row_folders: Mapping[str, str] | None = None
) -> str:
    """The report.

    curves: by run, of those that have any. row_folders: where the rows are, by run, seen from the
    report; beside it, in rows/, where it is not said.
    """
    style, script = _asset("style.css"), _asset("script.js")
    view = make_view(table)
    texts = {
        name: functools.partial(cell_text, view, column=name)
        for name in ("mean", "difference", "p")
    }
    facts = {
        "table": table,
        "texts": SimpleNamespace(**texts),
        "policy": _policy(style, script),
        "style": Markup(style),
        "script": Markup(script),
        "states": count_states(table),
        "state_texts": STATE_TEXTS,
        "numbers": cell_numbers(table),
        "warnings": warnings(table),
        "remarks": remarks(table, shown_columns(view)),
        "notes": notes_html(table.notes),
        "answer": answer(table),
        "results": result_entries(view),
        "effect_headings": EFFECT_HEADINGS,
        "effect_texts": effect_texts,
        "effect_remarks": effect_remarks(table),
        "sizes": size_table(table),
        "sizes_remark": SIZES_REMARK,
        "score_columns": _columns(view, is_cost=False),
        "cost_columns": _columns(view, is_cost=True),
        "heading": functools.partial(heading_of, view),
        "is_text": is_text,
        "num_rows": sum(len(summary.rows) for summary in table.cells),
        "cells": cell_lines(table),
        "runs": run_table(table, row_folders or {}),
    }
    return _templates().get_template("report.html").render(**facts, **_figures(table, curves))


def _figures(table: Table, curves: Mapping[str, Curves]) -> dict[str, Any]:
    forests = (figures.forest(group, cells) for group, cells in table.groups.items())
    rows = [row for summary in table.cells for row in summary.rows]
    return {
        "forests": [forest for forest in forests if forest],
        "curve_figures": curve_figures.curve_figures(table, curves),
        "styles": line_styles(table),
        "without_curves": [row.run for row in rows if row.run not in curves],
        "cost_figures": figures.cost_figures(table),
        "panel_px": curve_figures.PANEL_PX,
        "inner_px": curve_figures.PANEL_INNER_PX,
        "overview_px": curve_figures.OVERVIEW_PX,
        "overview_inner_px": curve_figures.OVERVIEW_INNER_PX,
        "cost_px": figures.COST_PX,
        "cost_inner_px": figures.COST_INNER_PX,
        "significant_p": figures.SIGNIFICANT_P,
    }


def line_styles(table: Table) -> dict[str, str]:
    """The classes that draw a cell's curve in the figures of all cells, by the cell's name."""
    styles: dict[str, str] = {}
    for cells in table.groups.values():
        drawn = figures.most_different(cells, curve_figures.MAX_LINES)
        others = [summary.cell.name for summary in drawn if not summary.cell.is_base]
        styles |= {summary.cell.name: "base" for summary in drawn if summary.cell.is_base}
        for number, name in enumerate(others):
            dash, colour = divmod(number, curve_figures.NUM_COLOURS)
            styles[name] = f"c{colour} d{dash}"
    return styles


def notes_html(text: str) -> Markup:
    """A user's Markdown as HTML, headings one level down.

    Raw HTML is escaped; images become links, because a browser would fetch them.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(_replace_forbidden(text))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_replace_forbidden,
    )


def _replace_forbidden(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _FORBIDDEN.sub("\ufffd", value)
    return value


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


# ---- the table of results


@dataclass(frozen=True)
class Entry:
    """A cell of an HTML table.

    key: sorts the column; empty is last in both directions. is_absent: a word instead of a number.
    """

    text: str
    key: str
    is_absent: bool = False


def cell_numbers(table: Table) -> dict[str, int]:
    """The cells' numbers in the report, from 1, by name."""
    return {summary.cell.name: number for number, summary in enumerate(table.cells, start=1)}


def _columns(view: View, is_cost: bool) -> list[str]:
    """The columns of the table of scores, or of that of costs."""
    columns = [name for name in shown_columns(view) if name != "marks"]
    return [name for name in columns if name == "cell" or (name in COST_COLUMNS) == is_cost]


def result_entries(view: View) -> dict[str, dict[str, Entry]]:
    """By cell and column, the table of results; its marks stand below the names of the cells."""
    columns = [name for name in shown_columns(view) if name != "marks"]
    lines = zip(view.table.cells, fields_of(view.table), strict=True)
    return {
        summary.cell.name: {name: _entry(view, summary, name, fields) for name in columns}
        for summary, fields in lines
    }


def _entry(view: View, summary: CellSummary, column: str, fields: Mapping[str, Any]) -> Entry:
    text = cell_text(view, summary, column)
    if is_text(column):
        return Entry(text, key=text)
    value = fields[column]
    key = "" if value is None else f"{value:.8g}"
    return Entry(text, key, is_absent=column == "mean" and value is None)


# ---- what each cell changes


@dataclass(frozen=True)
class CellLine:
    """A cell's overrides as written in set=, each with: does the base of the group not have it?

    left_out: those that only the base has. command: for its first seed.
    """

    summary: CellSummary
    overrides: tuple[tuple[str, bool], ...]
    left_out: tuple[str, ...]
    command: str


def cell_lines(table: Table) -> tuple[CellLine, ...]:
    """The overrides of each cell, compared with those of its base."""
    overrides = {
        summary.cell.name: split_overrides(summary.cell.overrides) for summary in table.cells
    }
    bases = {summary.cell.group: summary.cell for summary in table.cells if summary.cell.is_base}
    lines = []
    for summary in table.cells:
        base, own = bases.get(summary.cell.group), overrides[summary.cell.name]
        of_base = overrides[base.name] if base else ()
        paths = {text.partition("=")[0] for text in own}
        left_out = tuple(text for text in of_base if text.partition("=")[0] not in paths)
        marked = tuple((text, text not in of_base) for text in own)
        first_seed = command(summary.cell, summary.seeds[0].seed)
        lines.append(CellLine(summary, marked, left_out, first_seed))
    return tuple(lines)


def split_overrides(text: str) -> tuple[str, ...]:
    """The text of set= split at spaces outside of brackets and quotes; " ".join restores it.

    shlex would drop the quotes, and any text must be shown here, a malformed one too.
    """
    parts, depth, quote_mark, start = [], 0, "", 0
    for index, char in enumerate(text):
        if quote_mark:
            quote_mark = "" if char == quote_mark else quote_mark
        elif char in "'\"":
            quote_mark = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == " " and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return (*parts, text[start:]) if text else ()


# ---- the table of runs


@dataclass(frozen=True)
class RunLine:
    """One seed of a cell. facts: values of RunTable.headings. address: link to the row's file."""

    summary: CellSummary
    result: SeedResult
    score: Entry
    address: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class RunTable:
    """common: (name, value) of the facts that all rows share. headings: names of the others."""

    common: tuple[tuple[str, str], ...]
    headings: tuple[str, ...]
    lines: tuple[RunLine, ...]


def run_table(table: Table, row_folders: Mapping[str, str] | None = None) -> RunTable:
    """Every run of a table, with its provenance and the command that reproduces it."""
    rows = [row for summary in table.cells for row in summary.rows]
    values = {name: [describe(row) for row in rows] for name, describe in ROW_FACTS.items()}
    common = {name: v[0] for name, v in values.items() if len(v) > 1 and len(set(v)) == 1}
    headings = tuple(name for name in ROW_FACTS if rows and name not in common)
    lines = []
    for summary in table.cells:
        for result in summary.seeds:
            row, score = result.row, Entry("", "", is_absent=True)
            if result.value is not None:
                text = format_number(result.value, table.metric.digits)
                score = Entry(text, f"{result.value:.8g}")
            folder = (row_folders or {}).get(row.run, "rows") if row else ""
            address = f"{folder}/{quote(row.run, safe='')}.json" if row else ""
            facts = tuple(ROW_FACTS[name](row) if row else "" for name in headings)
            lines.append(RunLine(summary, result, score, address, facts))
    return RunTable(tuple(common.items()), headings, tuple(lines))


def count_states(table: Table) -> tuple[tuple[str, int], ...]:
    """How many runs are in each state, without the states of none."""
    states = [STATE_TEXTS[result.state] for summary in table.cells for result in summary.seeds]
    return tuple((text, states.count(text)) for text in STATE_TEXTS.values() if text in states)
