"""What a table is made from, read: the rows of its cells out of a large store, failures, notes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from trainer.ablation.cells import Cell
from trainer.ablation.failures import read_failures
from trainer.ablation.questions import Question, open_question
from trainer.base.errors import UserError
from trainer.recipe.identity import first_name, is_repetition
from trainer.report.row_index import fingerprints_of
from trainer.report.tables import Metric, Table, summarize
from trainer.runs.results import Row, read_row_file

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.]+:/")  # a Path has one slash left of the two


def open_table(source: Path | str, results: Path, runs: Path, metric: Metric) -> Table:
    """The table of an ablation, by name or path.

    Raises UserError for a mistake in the page, RowError for a damaged row that may be this ablation's.
    """
    question = open_question(source)
    rows = find_rows(results, [question])
    return summarize(
        question,
        by_cell(question, rows),
        metric,
        errors_in(runs, question),
        runs,
        read_notes(results, question.name),
    )


def find_rows(results: Path, questions: Iterable[Question]) -> dict[str, Row]:
    """The rows of some ablations by their runs' keys; of several of one run the first run, not what again=1 made later.

    Raises UserError for a store that is no folder, RowError for a damaged row that may be one of theirs.
    """
    if _URL.match(str(results)):
        raise UserError(
            f"results={results}: a table is made from a folder; copy the rows into <folder>/rows, or take the copy that make "
            "ablate keeps under runs/cells/stores"
        )
    questions = list(questions)
    identities = {run.key: run for question in questions for run in question.identities.values()}
    prefixes = {prefix for question in questions for prefix in question.prefixes}
    seeds = {seed for question in questions for seed in question.seeds}
    folder = results / "rows"
    if not folder.is_dir():
        return {}
    begins = _begins(prefixes, seeds)
    found = dict(fingerprints_of(folder, lambda run: begins.match(run) is not None))
    images = set(found.values())
    key_of = {
        (one.run_name(fingerprint), fingerprint): key
        for key, one in identities.items()
        for fingerprint in images
    }
    runs: dict[str, list[str]] = {}
    for run, fingerprint in found.items():
        if (key := key_of.get((first_name(run), fingerprint))) is not None:
            runs.setdefault(key, []).append(run)
    return {
        key: read_row_file(folder / f"{min(of_key, key=_first_run)}.json")
        for key, of_key in runs.items()
    }


def by_cell(question: Question, rows: Mapping[str, Row]) -> dict[tuple[str, int], Row | None]:
    """The row of every cell and seed, None where there is none."""
    return {place: rows.get(run.key) for place, run in question.identities.items()}


def _begins(prefixes: Iterable[str], seeds: Iterable[int]) -> re.Pattern:
    """How the names of some runs begin, their seeds included."""
    return re.compile(
        rf"(?:{'|'.join(map(re.escape, sorted(prefixes)))})(?:{'|'.join(map(str, sorted(seeds)))})-"
    )


def _first_run(run: str) -> tuple[bool, str]:
    return is_repetition(run), run


def stored_rows(results: Path, prefix: str) -> Iterator[Row]:
    """The rows of a store whose runs' names begin so, first runs first, then by name; files of others are not opened.

    Raises RowError for a damaged one.
    """
    names = [
        path.stem for path in (results / "rows").glob("*.json") if path.name.startswith(prefix)
    ]
    for name in sorted(names, key=_first_run):
        yield read_row_file(results / "rows" / f"{name}.json")


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
        failure = failures.get(question.identities[cell.name, seed].key)
        return failure.error if failure else None

    return error_of
