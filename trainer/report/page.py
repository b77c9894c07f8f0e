"""What stands on a report, as words and sort keys; nothing is escaped here, the template escapes all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import pandas as pd

from trainer.ablation.cells import command
from trainer.report.query import View, frame_of
from trainer.report.table_notes import versions_text
from trainer.report.table_texts import (
    STATE_WORDS,
    heading_of,
    is_text,
    number,
    shown_columns,
    text_of,
)
from trainer.report.tables import CellSummary, SeedResult, Table
from trainer.runs.results import Row


@dataclass(frozen=True)
class Column:
    """One column of a table on the page. is_text: words, sorted as such; else numbers."""

    name: str
    heading: str
    is_text: bool


@dataclass(frozen=True)
class Entry:
    """What stands in a table. key: what it is sorted by; empty: last, whichever way. is_absent: words where a number would be."""

    text: str
    key: str
    is_absent: bool = False


@dataclass(frozen=True)
class Line:
    """One cell. number: its place in the ablation, by which the figures call it."""

    number: int
    one: CellSummary
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class ResultTable:
    """The cells of one group."""

    group: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


def numbers_of(table: Table) -> dict[str, int]:
    """The cells' numbers on the page, from 1, by name."""
    return {one.cell.name: place for place, one in enumerate(table.cells, start=1)}


def result_tables(view: View) -> tuple[ResultTable, ...]:
    """The table of each group, the same words in it as in the other formats."""
    names = [
        name for name in shown_columns(view) if name != "marks"
    ]  # they stand under the cell's name
    columns = [Column(name, heading_of(view, name), is_text(name)) for name in names]
    frame = frame_of(view.table)
    keys = {column.name: frame[column.name].tolist() for column in columns if not column.is_text}
    found = [_line(view, place, one, columns, keys) for place, one in enumerate(view.table.cells)]
    return tuple(
        ResultTable(
            group, tuple(columns), tuple(line for line in found if line.one.cell.group == group)
        )
        for group in view.table.groups
    )


def _line(
    view: View, place: int, one: CellSummary, columns: Sequence[Column], keys: Mapping[str, list]
) -> Line:
    entries = []
    for column in columns:
        text = text_of(view, one, column.name)
        value = keys[column.name][place] if column.name in keys else text
        key = "" if value is pd.NA or value is None else text if column.is_text else f"{value:.8g}"
        entries.append(Entry(text, key, is_absent=column.name == "mean" and one.mean is None))
    return Line(place + 1, one, tuple(entries))


# ---- what each cell changes


@dataclass(frozen=True)
class Override:
    """A piece of set=, as written. is_own: the base of the group does not say the same."""

    text: str
    is_own: bool


@dataclass(frozen=True)
class CellLine:
    """A cell, its exact text of set= in pieces, and the command for its first seed. left_out: what only its base says."""

    number: int
    one: CellSummary
    overrides: tuple[Override, ...]
    left_out: tuple[str, ...]
    command: str


def cell_lines(table: Table) -> tuple[CellLine, ...]:
    """What makes each cell."""
    bases = {
        one.cell.group: pieces_of(one.cell.overrides) for one in table.cells if one.cell.is_base
    }
    lines = []
    for place, one in enumerate(table.cells, start=1):
        of_base, own = bases.get(one.cell.group, ()), pieces_of(one.cell.overrides)
        paths = {text.partition("=")[0] for text in own}
        left_out = tuple(text for text in of_base if text.partition("=")[0] not in paths)
        pieces = tuple(Override(text, text not in of_base) for text in own)
        lines.append(CellLine(place, one, pieces, left_out, command(one.cell, one.seeds[0].seed)))
    return tuple(lines)


def pieces_of(text: str) -> tuple[str, ...]:
    """The text of set= cut at the spaces that stand in no brackets and no quotation marks; joined by spaces, it is the text."""
    pieces, depth, mark, begin = [], 0, "", 0
    for place, letter in enumerate(text):
        if mark:
            mark = "" if letter == mark else mark
        elif letter in "'\"":
            mark = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == " " and depth == 0:
            pieces.append(text[begin:place])
            begin = place + 1
    return (*pieces, text[begin:]) if text else ()


# ---- rows


@dataclass(frozen=True)
class RunLine:
    """One seed of a cell: its row and where it is from, or why there is none.

    facts: what not all rows have alike, in the order of the headings.
    """

    number: int
    one: CellSummary
    result: SeedResult
    score: Entry
    state: str
    address: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    """All runs of a table. common: what all their rows have alike, by name. headings: of the other facts."""

    common: tuple[tuple[str, str], ...]
    headings: tuple[str, ...]
    lines: tuple[RunLine, ...]


def _commit(row: Row) -> str:
    told = row.commit[:12] if row.commit else "not known"
    return told + {True: ", with uncommitted changes", False: "", None: ""}[row.dirty]


_FACTS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: f"{row.recipe}.v{row.version} (digest {row.digest[:12]})",
    "model": lambda row: row.model,
    "data": lambda row: f"{row.data} (fingerprint {row.data_fingerprint[:12]})",
    "scored on": lambda row: f"{row.num_val_images:,} images of {row.split}",
    "weights scored": lambda row: {"model": "the model's own", "average": "their average"}[
        row.scored
    ],
    "epochs": lambda row: f"{row.epochs:,}",
    "steps": lambda row: f"{row.steps:,}",
    "images a step": lambda row: f"{row.batch_images:,}",
    "images a norm's sample": lambda row: f"{row.norm_images:,}",
    "device": lambda row: row.device,
    "precision": lambda row: row.precision,
    "threads": lambda row: f"{row.num_threads}",
    "loader": lambda row: f"{row.loader}, {row.num_workers} workers",
    "ranks": lambda row: f"{row.world_size}",
    "bit for bit again here": lambda row: "yes" if row.bitwise else "no",
    "images replaced": lambda row: f"{row.num_replaced_images:,}",
    "changes while it ran": lambda row: "; ".join(row.changes) or "none",
    "versions": versions_text,
    "commit": _commit,
    "weights sha256": lambda row: (row.weights_sha256 or "none")[:12],
    "finished UTC": lambda row: row.finished_utc,
}


def runs_of(table: Table) -> Runs:
    """Every run of a table, where it is from and the command for it."""
    results = [
        (place, one, result)
        for place, one in enumerate(table.cells, start=1)
        for result in one.seeds
    ]
    rows = [result.row for _, _, result in results if result.row]
    told = {name: [of(row) for row in rows] for name, of in _FACTS.items()}
    alike = {name for name, texts in told.items() if len(texts) > 1 and len(set(texts)) == 1}
    headings = tuple(name for name in _FACTS if rows and name not in alike)
    common = tuple((name, texts[0]) for name, texts in told.items() if name in alike)
    return Runs(common, headings, tuple(_run_line(table, *found, headings) for found in results))


def _run_line(
    table: Table, place: int, one: CellSummary, result: SeedResult, headings: Sequence[str]
) -> RunLine:
    row, metric = result.row, table.metric
    if result.value is None:
        score = Entry(STATE_WORDS[result.state], "", is_absent=True)
    else:
        score = Entry(number(result.value, metric.digits), f"{result.value:.8g}")
    address = f"rows/{quote(row.run, safe='')}.json" if row else ""
    facts = tuple(_FACTS[name](row) if row else "" for name in headings)
    return RunLine(place, one, result, score, STATE_WORDS[result.state], address, facts)


def states_of(table: Table) -> tuple[tuple[str, int], ...]:
    """How many runs of the table are in each state, those of no run left out."""
    states = [STATE_WORDS[result.state] for one in table.cells for result in one.seeds]
    return tuple((words, states.count(words)) for words in STATE_WORDS.values() if words in states)
