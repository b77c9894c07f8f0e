"""An ablation as one page that opens from disk: results/<ablation>.html, with no network, no clock, no chance.

The template escapes every text. The page's own style and script are named in its security policy by their digests, so
that nothing else can run or be loaded, whatever a row says.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from trainer.base.disk import write_atomically
from trainer.report import figures
from trainer.report.compare import Curves
from trainer.report.curves import find_curves, keep_curves
from trainer.report.page import cell_lines, numbers_of, result_tables, runs_of, states_of
from trainer.report.query import make_view
from trainer.report.table_notes import remarks, warnings
from trainer.report.table_texts import text_of
from trainer.report.tables import Table

ASSETS = Path(__file__).parent / "assets"
# no character of a page: control characters but tab and line end, halves of pairs, what Unicode keeps for itself
_NO_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def store_report(results: Path, table: Table) -> list[Path]:
    """Write a table's report and the curves in it; nothing where no run has a row yet."""
    if not any(one.rows for one in table.cells):
        return []
    curves = find_curves(results, table)
    path = results / f"{table.name}.html"
    kept = keep_curves(results, table, curves)
    write_atomically(path, as_html(table, curves).encode())
    return [path, *([kept] if kept else [])]


def as_html(table: Table, curves: Mapping[str, Curves]) -> str:
    """The page. curves: by run, of those that have any."""
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    view = make_view(table)
    texts = SimpleNamespace(
        **{
            name: functools.partial(text_of, view, column=name)
            for name in ("mean", "difference", "p")
        }
    )
    return (
        _templates()
        .get_template("page.html")
        .render(
            table=table,
            texts=texts,
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            states=states_of(table),
            numbers=numbers_of(table),
            warnings=warnings(table),
            remarks=remarks(table),
            notes=notes_html(table.notes),
            results=result_tables(view),
            forests=[
                one
                for group, cells in table.groups.items()
                if (one := figures.forest(group, cells))
            ],
            curve_figures=figures.curve_figures(table, curves),
            without_curves=[
                row.run for one in table.cells for row in one.rows if row.run not in curves
            ],
            num_rows=sum(len(one.rows) for one in table.cells),
            cost_figures=figures.cost_figures(table),
            cells=cell_lines(table),
            runs=runs_of(table),
            panel_px=figures.PANEL_PX,
            inner_px=figures.PANEL_INNER_PX,
            cost_px=figures.COST_PX,
            cost_inner_px=figures.COST_INNER_PX,
            clear_p=figures.CLEAR_P,
        )
    )


def notes_html(text: str) -> Markup:
    """A user's Markdown as HTML: no HTML of its own, no pictures (they would be fetched), headings one level down."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = reader.parse(_characters(text))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    return Markup(reader.renderer.render(tokens, reader.options, {}))


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_characters,
    )


def _characters(value):
    """A text without what is no character of a page; anything else as it is."""
    return (
        _NO_CHARACTER.sub("\ufffd", value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded or run but this page's own style and script."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
