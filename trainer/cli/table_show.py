"""What table, compare and reproduce print and store; no decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from trainer.ablation.questions import open_question, shipped_pages
from trainer.base.disk import write_atomically
from trainer.base.errors import UserError, did_you_mean
from trainer.base.stats import published_spread_pct
from trainer.base.terminal import open_terminal
from trainer.report.compare import differences, plot, read_curves
from trainer.report.formats import as_csv, as_markdown
from trainer.report.latex import as_latex
from trainer.report.query import COST_COLUMNS, DEFAULT_COLUMNS, View
from trainer.report.table_notes import remarks, warnings
from trainer.report.table_rows import by_cell, errors_in, find_rows
from trainer.report.table_texts import heading_of, is_text, shown_columns, text_of
from trainer.report.tables import METRICS, Table, summarize
from trainer.runs.results import Row

FORMATS: dict[str, Callable[[View], str]] = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


def console() -> Console:
    """The terminal, as show.console gives it, without all that show prints: a table needs no torch."""
    return open_terminal(least_columns=160)


def find_format(name: str) -> Callable[[View], str] | None:
    """The writer of a format, None for the terminal's. Raises UserError for an unknown one."""
    if name == "terminal":
        return None
    if name not in FORMATS:
        known = ["terminal", *FORMATS]
        raise UserError(
            f"format={name}: unknown{did_you_mean(name, known)}; valid: {', '.join(known)}"
        )
    return FORMATS[name]


def refuse_alone(**given) -> None:
    """Refuse what belongs to one ablation where none is named. Raises UserError."""
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise UserError(f"{names[0]}= is for the table of one ablation; use ablation=<its name>")


def print_table(out: Console, view: View) -> None:
    """The table for a terminal: one for each group, what must be known under it, why runs failed."""
    table = view.table
    out.print(table.title, style="bold", markup=False)
    out.print(table.question, markup=False)
    for group in table.groups:
        for columns in _on_a_screen(view):
            out.print(_group_table(view, group, columns))
    for line in warnings(table):
        out.print(f"warning: {line}", style="yellow", markup=False)
    for one in table.cells:
        for result in one.seeds:
            if result.state == "failed":
                out.print(
                    f"failed: {one.cell.name} seed {result.seed}: {result.error}",
                    style="red",
                    markup=False,
                )
    for line in remarks(table):
        out.print(line, style="dim", markup=False)


def _on_a_screen(view: View) -> list[tuple[str, ...]]:
    """The columns in tables that a screen is wide enough for: scores and costs, where nobody asked for columns."""
    columns = shown_columns(view)
    if view.columns != DEFAULT_COLUMNS:
        return [columns]
    costs = tuple(name for name in columns if name in COST_COLUMNS)
    scores = tuple(name for name in columns if name not in COST_COLUMNS)
    return [scores, ("cell", *costs)] if costs else [scores]


def _group_table(view: View, group: str, columns: tuple[str, ...]) -> RichTable:
    shown = RichTable(title=Text(group), title_justify="left")
    for column in columns:
        shown.add_column(
            Text(heading_of(view, column)), justify="left" if is_text(column) else "right"
        )
    for one in view.table.groups[group]:
        texts = (Text(text_of(view, one, column)) for column in columns)
        shown.add_row(*texts, style="bold" if one.cell.is_base else "yellow" if one.marks else None)
    return shown


def store_table(results: Path, view: View) -> list[Path]:
    """Write a whole table in every format; nothing where no run has a row yet."""
    if not any(one.rows for one in view.table.cells):
        return []
    paths = []
    for suffix, writer in FORMATS.items():
        path = results / f"{view.table.name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, writer(view).encode())
        paths.append(path)
    return paths


def print_stored(out: Console, table: Table, paths: list[Path]) -> None:
    """Where the table lies, or how it comes to be."""
    if paths:
        out.print(f"stored {', '.join(map(str, paths))}", markup=False)
    else:
        out.print(
            f"no run has a row yet, nothing is stored; make ablate ablation={table.name} runs it",
            markup=False,
        )


def list_of_ablations(results: Path, runs: Path) -> RichTable:
    """One line for each ablation that comes with the suite: its question, and how far its runs are."""
    questions = [open_question(path) for path in shipped_pages()]
    rows = find_rows(results, questions)
    shown = RichTable(
        "ablation", "question", "cells x seeds", "finished", "diverged", "failed", "no row"
    )
    for question in questions:
        table = summarize(
            question, by_cell(question, rows), METRICS["top1"], errors_in(runs, question)
        )
        states = [result.state for one in table.cells for result in one.seeds]
        counts = [
            states.count("finished") + states.count("no value"),
            *map(states.count, ("diverged", "failed", "missing")),
        ]
        size = f"{len(table.cells)} x {len(table.seeds)}"
        shown.add_row(
            Text(question.name),
            Text(question.question),
            size,
            *(str(count or "") for count in counts),
        )
    return shown


def print_comparison(out: Console, a: Row, b: Row, runs: Path) -> None:
    """What differs between two rows, then both curves, as far as their folders are here."""
    out.print(f"a  {a.run}", markup=False, style="cyan")
    out.print(f"b  {b.run}", markup=False, style="magenta")
    found = differences(a, b)
    if found:
        out.print(_differences_table(found))
    else:
        out.print("the rows differ in their names and dates alone")
    if (
        a.top1_pct is not None
        and b.top1_pct is not None
        and a.data_fingerprint == b.data_fingerprint
    ):
        size = a.num_val_images
        out.print(
            f"one of {size:,} val images is {100 / size:.3g} points; seeds alone move top-1 by about "
            f"{published_spread_pct(size):.2g} (RSB's 0.10 on 50,000): two runs are one pair, not a finding",
            style="dim",
        )
    curves = {letter: read_curves(runs / row.run, row) for letter, row in (("a", a), ("b", b))}
    here = {letter: one for letter, one in curves.items() if one is not None}
    for letter, row in (("a", a), ("b", b)):
        if letter not in here:
            out.print(
                f"{letter} has no curves here: no {runs / row.run / 'metrics.jsonl'}",
                style="dim",
                markup=False,
            )
    _print_plot(out, "val top-1 %", {letter: one.val_top1 for letter, one in here.items()})
    _print_plot(
        out, "training loss, nats", {letter: one.train_loss for letter, one in here.items()}
    )


def _differences_table(found) -> RichTable:
    shown = RichTable("", "what", "a", "b", "b - a")
    last = None
    for one in found:
        if last not in (None, one.section):
            shown.add_section()
        shown.add_row(
            "" if one.section == last else one.section,
            *map(Text, (one.name, one.a, one.b, one.change)),
        )
        last = one.section
    return shown


def _print_plot(out: Console, title: str, curves: Mapping) -> None:
    lines = plot(curves)
    if lines:
        out.print(f"{title} ({', '.join(curves)}; * where they meet)", style="bold", markup=False)
        for line in lines:
            out.print(line, markup=False)


def print_verdict(out: Console, row: Row, again: Row, judged) -> None:
    """What a rerun says about a row. judged: a reproduce.Verdict."""
    out.print(f"row    {row.run}", markup=False)
    out.print(f"again  {again.run}", markup=False)
    for line in judged.lines:
        out.print(line, markup=False)
    out.print(judged.kind, style="bold green" if judged.is_reproduced else "bold red")
