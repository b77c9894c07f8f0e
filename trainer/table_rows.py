"""What a table is made from, read: the ablation's page, its rows out of a large store, its failures, its notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.ablation import Ablation, load_ablation
from trainer.cells import Cell, plan_key, plan_of_cell, rows_of
from trainer.errors import UserError
from trainer.failures import read_failures
from trainer.results import Row, read_row_file
from trainer.tables import Metric, Table, summarize


def open_table(source: Path | str, results: Path, runs: Path, metric: Metric) -> Table:
    """The table of an ablation, by name or path.

    Raises UserError for a mistake in the page, RowError for a damaged row that is this ablation's.
    """
    ablation = load_ablation(source)
    rows = rows_of(ablation, read_rows(results, prefixes_of(ablation)))
    return summarize(ablation, rows, metric, errors_in(runs), runs, read_notes(results, ablation.name))


def prefixes_of(ablation: Ablation) -> set[str]:
    """How the names of an ablation's runs begin: `<recipe>.v<N>-<model>-<data>-s`."""
    plans = [plan_of_cell(cell, ablation.seeds[0]) for cell in ablation.cells]
    return {f"{plan.recipe.name}.v{plan.recipe.version}-{plan.model}-{plan.profile.name}-s" for plan in plans}


def read_rows(results: Path, prefixes: Iterable[str] = ("",)) -> list[Row]:
    """The rows of a store whose runs' names begin with one of the prefixes, by name: files of others are not opened.

    Raises RowError for a damaged one.
    """
    folder, wanted = results / "rows", tuple(prefixes)
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".json")
    return [read_row_file(folder / name) for name in names if name.startswith(wanted)]


def notes_path(results: Path, name: str) -> Path:
    return results / f"{name}.notes.md"


def read_notes(results: Path, name: str) -> str:
    """What the user wrote about an ablation in `<results>/<name>.notes.md`; nothing where there is no such file."""
    path = notes_path(results, name)
    try:
        return path.read_text().strip() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def errors_in(runs: Path) -> Callable[[Cell, int], str | None]:
    """What a failed seed of a cell said last, None where it has not failed."""
    failures = read_failures(runs)

    def error_of(cell: Cell, seed: int) -> str | None:
        failure = failures.get(plan_key(plan_of_cell(cell, seed))) if failures else None
        return failure.error if failure else None

    return error_of
