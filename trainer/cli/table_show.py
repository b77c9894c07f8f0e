"""Printing and storing for the commands table, compare and reproduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from trainer.ablation.questions import open_question, shipped_ablations
from trainer.base.commands import command
from trainer.base.disk import write_atomically
from trainer.base.errors import UserError, did_you_mean
from trainer.base.plural import counted
from trainer.base.stats import Difference, published_spread_pct
from trainer.base.tensorboard import tensorboard_command
from trainer.base.terminal import open_terminal
from trainer.report.compare import (
    CellContrast,
    RowDifference,
    compare_two_cells,
    find_row,
    have_same_data,
    have_same_loss,
    row_differences,
)
from trainer.report.curves import Points, read_curves, text_plot
from trainer.report.formats import (
    EFFECT_HEADINGS,
    as_csv,
    as_markdown,
    cell_text,
    difference_text,
    effect_texts,
    effects_csv,
    format_number,
    heading_of,
    is_text,
    p_text,
    shown_columns,
)
from trainer.report.hparams import write_hparams
from trainer.report.html import store_report
from trainer.report.latex import as_latex
from trainer.report.notes import effect_remarks, remarks, warnings
from trainer.report.rows import Stores, by_cell, errors_in, find_rows, open_table, stores_of
from trainer.report.tables import METRICS, State, Table, find_metric, summarize
from trainer.report.test_sizes import REMARK, SizeTable, size_table
from trainer.report.view import COST_COLUMNS, DEFAULT_COLUMNS, View, make_view
from trainer.runs.results import Row

FORMATS: dict[str, Callable[[View], str]] = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


def wide_console() -> Console:
    """A wide terminal; not that of runs.summary, which imports torch."""
    return open_terminal(least_columns=160)


def show_table(
    ablation: str,
    results: str,
    runs: Path,
    metric: str,
    sort: str,
    columns: str,
    filter_: str,
    format_: str,
) -> None:
    """Print the table of an ablation, or without a name the list of all; store a whole one."""
    out, stores = wide_console(), stores_of(results)
    if not ablation:
        given: dict[str, object] = {"sort": sort, "columns": columns, "filter": filter_}
        given |= {"metric": metric != "top1", "format": format_ != "terminal"}
        option = next((name for name, is_given in given.items() if is_given), None)
        if option:
            raise UserError(f"{option}= needs an ablation; add ablation=<name>")
        out.print(list_of_ablations(stores, runs))
        return
    writer = _find_writer(format_)
    table = open_table(ablation, stores, runs, find_metric(metric))
    view = make_view(table, sort, columns, filter_)
    if writer is not None:
        typer.echo(writer(view), nl=False)  # not out: it would wrap lines and read markup
        return
    print_table(out, view)
    if view.is_whole and metric == "top1":
        paths = [*store_table(stores[0], view), *store_report(stores, table)]
        print_stored(out, ablation, paths)
        if paths and runs.is_dir():
            write_hparams(table, runs)
            out.print(f"curves and scores: {tensorboard_command(runs)}", markup=False)


def _find_writer(format_: str) -> Callable[[View], str] | None:
    """None for the terminal."""
    if format_ == "terminal":
        return None
    if format_ not in FORMATS:
        known = ["terminal", *FORMATS]
        hint = did_you_mean(format_, known)
        raise UserError(f"format={format_}: unknown format{hint}; valid: {', '.join(known)}")
    return FORMATS[format_]


def print_table(out: Console, view: View) -> None:
    """The table for a terminal: one per group, warnings, errors of failed runs, remarks."""
    table = view.table
    out.print(table.title, style="bold", markup=False)
    out.print(table.question, markup=False)
    for group in table.groups:
        for columns in _split_columns(view):
            out.print(_group_table(view, group, columns))
    if table.effects:
        out.print(_effects_table(table))
    sizes = size_table(table)
    if sizes is not None:
        out.print(_sizes_table(table, sizes))
    for line in warnings(table):
        out.print(f"warning: {line}", style="yellow", markup=False)
    for summary in table.cells:
        for result in summary.seeds:
            if result.state == "failed":
                line = f"failed: {summary.cell.name} seed {result.seed}: {result.error}"
                out.print(line, style="red", markup=False)
    more = (*effect_remarks(table), *((REMARK,) if sizes is not None else ()))
    for line in (*remarks(table, shown_columns(view)), *more):
        out.print(line, style="dim", markup=False)


def _sizes_table(table: Table, sizes: SizeTable) -> RichTable:
    shown = RichTable(title=Text("at other image sizes"), title_justify="left")
    for place, heading in enumerate(sizes.headings):
        shown.add_column(Text(heading), justify="right" if place else "left")
    for line in sizes.lines:
        group = f" ({line.group})" if len(table.groups) > 1 else ""
        shown.add_row(*map(Text, (f"{line.cell}{group}", *line.texts)))
    return shown


def _effects_table(table: Table) -> RichTable:
    shown = RichTable(title=Text("main effects and interactions"), title_justify="left")
    for place, heading in enumerate(EFFECT_HEADINGS):
        shown.add_column(Text(heading), justify="right" if place > 1 else "left")
    last = table.effects[0].group
    for effect in table.effects:
        if effect.group != last:
            shown.add_section()
            last = effect.group
        group = f" ({effect.group})" if len(table.groups) > 1 else ""
        factors, *texts = effect_texts(effect, table.metric)
        shown.add_row(*map(Text, (f"{factors}{group}", *texts)))
    return shown


def _split_columns(view: View) -> list[tuple[str, ...]]:
    """The default columns as two tables that fit a screen, scores and costs; others as given."""
    columns = shown_columns(view)
    if view.columns != DEFAULT_COLUMNS:
        return [columns]
    costs = tuple(name for name in columns if name in COST_COLUMNS)
    scores = tuple(name for name in columns if name not in COST_COLUMNS)
    return [scores, ("cell", *costs)] if costs else [scores]


def _group_table(view: View, group: str, columns: tuple[str, ...]) -> RichTable:
    shown = RichTable(title=Text(group), title_justify="left")
    for column in columns:
        side: Literal["left", "right"] = "left" if is_text(column) else "right"
        shown.add_column(Text(heading_of(view, column)), justify=side)
    for summary in view.table.groups[group]:
        texts = (Text(cell_text(view, summary, column)) for column in columns)
        style = "bold" if summary.cell.is_base else "yellow" if summary.marks else None
        shown.add_row(*texts, style=style)
    return shown


def store_table(results: Path, view: View) -> list[Path]:
    """Write a whole table in every format; nothing where no run has a row yet."""
    if not any(summary.rows for summary in view.table.cells):
        return []
    paths = []
    texts = {suffix: writer(view) for suffix, writer in FORMATS.items()}
    if view.table.effects:
        texts["effects.csv"] = effects_csv(view.table)
    for suffix, text in texts.items():
        path = results / f"{view.table.name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
        paths.append(path)
    return paths


def print_stored(out: Console, ablation: str, paths: list[Path]) -> None:
    """The files written, or how to get a first row. ablation: as it was given."""
    line = f"no rows yet, nothing stored; run {command('ablate', ablation=ablation)}"
    out.print(f"stored {', '.join(map(str, paths))}" if paths else line, markup=False)


def list_of_ablations(results: Stores, runs: Path) -> RichTable:
    """The shipped ablations, one per line: question and progress."""
    questions = [open_question(path) for path in shipped_ablations()]
    rows = find_rows(results, questions)
    counted: dict[str, tuple[State, ...]] = {
        "finished": ("finished", "no value"),
        "diverged": ("diverged",),
        "failed": ("failed",),
        "no row": ("missing",),
    }
    shown = RichTable("ablation", "question", "cells x seeds", *counted)
    for question in questions:
        errors = errors_in(runs, question)
        table = summarize(question, by_cell(question, rows), METRICS["top1"], errors)
        states = [result.state for summary in table.cells for result in summary.seeds]
        counts = (sum(state in names for state in states) for names in counted.values())
        size = f"{len(table.cells)} x {len(table.seeds)}"
        texts = Text(question.name), Text(question.question), size
        shown.add_row(*texts, *(str(count or "") for count in counts))
    return shown


def show_cells(ablation: str, a: str, b: str, results: Path, runs: Path) -> None:
    """Print the contrast of two cells of an ablation."""
    table = open_table(ablation, results, runs, METRICS["top1"])
    print_contrast(wide_console(), table, compare_two_cells(table, a, b))


def print_contrast(out: Console, table: Table, found: CellContrast) -> None:
    """Both cells by seed, their difference with interval, n and p, and what it is good for."""
    view, metric = make_view(table), table.metric
    a, b = found.a, found.b
    shown = RichTable("seed", "a", "b", "b − a", title=Text(metric.heading), title_justify="left")
    for column in shown.columns:
        column.justify = "right"
    for seed in table.seeds:
        pair = [one.values[seed] for one in (a, b) if seed in one.values]
        texts = [
            format_number(one.values[seed], metric.digits) if seed in one.values else ""
            for one in (a, b)
        ]
        gain = format_number(pair[1] - pair[0], metric.digits, "+") if len(pair) == 2 else ""
        shown.add_row(str(seed), *texts, gain)
    difference = found.difference
    shown.add_section()
    means = (cell_text(view, summary, "mean") for summary in (a, b))
    shown.add_row("mean ± std", *means, difference_text(difference, metric), style="bold")
    for letter, summary, style in (("a", a, "cyan"), ("b", b, "magenta")):
        out.print(f"{letter}  {summary.cell.name}", markup=False, style=style)
        overrides = summary.cell.overrides
        out.print(f"   recipe={summary.cell.recipe} set={overrides}", markup=False, style="dim")
    out.print(shown)
    for line in contrast_lines(difference):
        out.print(line, markup=False)


def contrast_lines(difference: Difference | None) -> list[str]:
    """How a contrast was tested, and what that says."""
    if difference is None:
        return ["no difference: one of the cells has no value"]
    how = {
        "paired": f"paired over {counted(difference.num_pairs, 'seed')}",
        "welch": "Welch's t-test, fewer than two seeds in common",
        "single": f"{counted(difference.num_pairs, 'seed')} in common",
    }[difference.kind]
    if difference.p is None:
        return [f"b − a: {how}; nothing to test, no interval"]
    return [
        f"b − a: {how}, 95 % confidence interval, p = {p_text(difference.p)} (Student's t, "
        "two-sided)",
        "for one comparison that was chosen before its scores were seen: of several, multiply p by "
        "their number",
    ]


def show_comparison(a: str, b: str, results: Path, runs: Path) -> None:
    """Print the comparison of two runs, each given by its name or folder."""
    print_comparison(wide_console(), find_row(a, results, runs), find_row(b, results, runs), runs)


def print_comparison(out: Console, a: Row, b: Row, runs: Path) -> None:
    """The differences of two rows, then the learning curves of those whose run folder is here."""
    out.print(f"a  {a.run}", markup=False, style="cyan")
    out.print(f"b  {b.run}", markup=False, style="magenta")
    differing = row_differences(a, b)
    if differing:
        out.print(_differences_table(differing))
    else:
        out.print("the rows differ only in name and date")
    is_same_data = have_same_data(a, b)
    if not is_same_data:
        out.print("other data: their scores are not comparable", style="yellow")
    has_scores = None not in (a.main_pct, b.main_pct)
    if has_scores and a.is_counted and is_same_data:
        size = a.num_val_images
        out.print(
            f"one of {size:,} val images is {100 / size:.3g} points; the seed alone gives top-1 a "
            f"standard deviation of about {published_spread_pct(size):.2g} points (RSB's 0.10 on "
            "50,000 images, scaled): one pair of runs is no evidence",
            style="dim",
        )
    curves = {}
    for letter, row in (("a", a), ("b", b)):
        found = read_curves(runs / row.run, row)
        if found is None:
            path = runs / row.run / "metrics.jsonl"
            out.print(f"{letter}: no curves, {path} not found", style="dim", markup=False)
        else:
            curves[letter] = found
    labels = {"a": f"val {a.main_label} %", "b": f"val {b.main_label} %"}
    scores = {name: line.val_top1 for name, line in curves.items()}
    _print_plots(out, labels, scores, is_same_data and labels["a"] == labels["b"])
    losses = {name: line.train_loss for name, line in curves.items()}
    titles = dict.fromkeys("ab", "training loss, nats")
    _print_plots(out, titles, losses, is_same_data and have_same_loss(a, b))


def _differences_table(differing: Sequence[RowDifference]) -> RichTable:
    shown = RichTable("", "what", "a", "b", "b - a")
    last = None
    for difference in differing:
        if last not in (None, difference.section):
            shown.add_section()
        heading = "" if difference.section == last else difference.section
        texts = difference.name, difference.a, difference.b, difference.change
        shown.add_row(heading, *map(Text, texts))
        last = difference.section
    return shown


def _print_plots(
    out: Console, titles: Mapping[str, str], curves: Mapping[str, Points], are_comparable: bool
) -> None:
    """Curves by letter, on one axis where they are comparable, else each on its own."""
    if are_comparable:
        _print_plot(out, titles["a"], curves)
        return
    for letter, points in curves.items():
        _print_plot(out, titles[letter], {letter: points})


def _print_plot(out: Console, title: str, curves: Mapping[str, Points]) -> None:
    lines = text_plot(curves)
    if lines:
        both = "; * both" if len(curves) > 1 else ""
        out.print(f"{title} ({', '.join(curves)}{both})", style="bold", markup=False)
        for line in lines:
            out.print(line, markup=False)


def print_verdict(out: Console, row: Row, again: Row, judged) -> None:
    """judged: a reproduce.Verdict."""
    out.print(f"row    {row.run}", markup=False)
    out.print(f"again  {again.run}", markup=False)
    for line in judged.lines:
        out.print(line, markup=False)
    out.print(judged.kind, style="bold green" if judged.is_reproduced else "bold red")
