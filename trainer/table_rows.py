"""What a table is made from, read: the rows of its cells out of a large store, failures, notes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from trainer.cells import Cell, row_key
from trainer.errors import UserError
from trainer.failures import read_failures
from trainer.questions import Question, open_question
from trainer.results import Row, read_row_file
from trainer.tables import Metric, Table, summarize

AGAIN = re.compile(r"(?<=-[0-9a-f]{6})-\d+$")  # what again=1 puts behind a run's name


def open_table(source: Path | str, results: Path, runs: Path, metric: Metric) -> Table:
    """The table of an ablation, by name or path.

    Raises UserError for a mistake in the page, RowError for a damaged row that may be this ablation's.
    """
    question = open_question(source)
    rows = find_rows(results, [question])
    return summarize(question, by_cell(question, rows), metric, errors_in(runs, question), runs, read_notes(results, question.name))


def find_rows(results: Path, questions: Iterable[Question]) -> dict[str, Row]:
    """The rows of some ablations by key; of several of one key the first run, not what again=1 made later.

    One row after the other is read and dropped again, so that a large store needs little memory.
    """
    questions = list(questions)
    wanted = {key for question in questions for key in question.keys.values()}
    prefixes = {prefix for question in questions for prefix in question.prefixes}
    seeds = {seed for question in questions for seed in question.seeds}
    found: dict[str, Row] = {}
    for row in stored_rows(results, prefixes, seeds):
        key = row_key(row)
        if key in wanted:
            found.setdefault(key, row)
        if len(found) == len(wanted):
            break
    return found


def by_cell(question: Question, rows: Mapping[str, Row]) -> dict[tuple[str, int], Row | None]:
    """The row of every cell and seed, None where there is none."""
    return {place: rows.get(key) for place, key in question.keys.items()}


def stored_rows(results: Path, prefixes: Iterable[str] = ("",), seeds: Iterable[int] | None = None) -> Iterator[Row]:
    """The rows of a store, first runs first, then by name; files of others are not opened.

    prefixes: how the runs' names begin, up to the seed where `seeds` says which seeds are wanted.

    Raises RowError for a damaged one.
    """
    folder, begin = results / "rows", tuple(prefixes)
    if not folder.is_dir():
        return
    names = [path.stem for path in folder.iterdir() if path.suffix == ".json" and path.name.startswith(begin)]
    if seeds is not None:
        of_seed = re.compile(rf"(?:{'|'.join(map(re.escape, begin))})(?:{'|'.join(map(str, sorted(seeds)))})-")
        names = [name for name in names if of_seed.match(name)]
    for name in sorted(names, key=lambda name: (AGAIN.search(name) is not None, name)):
        yield read_row_file(folder / f"{name}.json")


def notes_path(results: Path, name: str) -> Path:
    return results / f"{name}.notes.md"


def read_notes(results: Path, name: str) -> str:
    """What the user wrote about an ablation in `<results>/<name>.notes.md`; nothing where there is no such file."""
    path = notes_path(results, name)
    try:
        return path.read_text().strip() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def errors_in(runs: Path, question: Question) -> Callable[[Cell, int], str | None]:
    """What a failed seed of a cell said last, None where it has not failed."""
    failures = read_failures(runs)

    def error_of(cell: Cell, seed: int) -> str | None:
        failure = failures.get(question.keys[cell.name, seed])
        return failure.error if failure else None

    return error_of
