"""Reading what a table is made from: rows of one or several stores, failures, the user's notes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from trainer.ablation.cells import Cell
from trainer.ablation.failures import read_failures
from trainer.ablation.questions import CACHE_VERSION, Question, open_question
from trainer.base.cache import cache_folder
from trainer.base.commands import command
from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.recipe.identity import first_name, is_repetition
from trainer.report.tables import Metric, Table, summarize
from trainer.runs.results import Row, RowError, read_row_file, rows_folder

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.]+:/")  # Path("s3://bucket") has one slash left


Stores = Path | Sequence[Path]  # folders of stored rows; the first is written to


def stores_of(text: str) -> tuple[Path, ...]:
    """The folders that results= names: one, spaces in its name or not, or several between spaces.

    Raises UserError for one of several that has no rows.
    """
    if Path(text).is_dir() or len(text.split()) < 2:
        return (Path(text),)
    stores = tuple(map(Path, dict.fromkeys(text.split())))
    for store in stores:
        if not _URL.match(str(store)) and not rows_folder(store).is_dir():
            raise UserError(
                f"results={text}: {store} has no folder rows", "name folders that hold one"
            )
    return stores


def folders_of(stores: Stores) -> Sequence[Path]:
    """The stores as a list of folders."""
    return [stores] if isinstance(stores, Path) else stores


def open_table(source: Path | str, results: Stores, runs: Path, metric: Metric) -> Table:
    """The table of an ablation, by name or path.

    Raises UserError for a mistake in the ablation file, RowError for a damaged row that may belong
    to it.
    """
    question = open_question(source)
    return summarize(
        question,
        by_cell(question, find_rows(results, [question])),
        metric,
        errors_in(runs, question),
        runs,
        _notes_of(folders_of(results), question.name),
    )


def find_rows(results: Stores, questions: Iterable[Question]) -> dict[str, Row]:
    """The rows of some ablations by key; the original run, not a rerun by again=1.

    Raises UserError for a store that is no folder, RowError for a damaged row that may be one of
    theirs, and for a run of which two stores have unlike rows.
    """
    questions = list(questions)
    identities = {run.key: run for question in questions for run in question.identities.values()}
    is_candidate = _name_pattern(questions).match
    fingerprints: dict[str, str] = {}
    files: dict[str, Path] = {}
    for store in folders_of(results):
        for run, fingerprint in _fingerprints_of(store, lambda run: is_candidate(run) is not None):
            path = rows_folder(store) / f"{run}.json"
            if run in files and files[run].resolve() != path.resolve():
                _check_same(files[run], path)
            else:
                fingerprints[run], files[run] = fingerprint, path
    key_of = {
        (identity.run_name(fingerprint), fingerprint): key
        for key, identity in identities.items()
        for fingerprint in set(fingerprints.values())
    }
    runs_by_key: dict[str, list[str]] = {}
    for run, fingerprint in fingerprints.items():
        if (key := key_of.get((first_name(run), fingerprint))) is not None:
            runs_by_key.setdefault(key, []).append(run)
    return {
        key: read_row_file(files[min(runs, key=_original_first)])
        for key, runs in runs_by_key.items()
    }


def _fingerprints_of(store: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(run, data fingerprint) of the wanted rows of a store; none where it has no rows yet."""
    if _URL.match(str(store)):
        raise UserError(
            f"results={store}: a table needs a local folder; copy the rows into <folder>/rows, "
            f"or use the copy that {command('ablate')} keeps under runs/cells/stores"
        )
    folder = rows_folder(store)
    return _fingerprints_in(folder, is_wanted) if folder.is_dir() else iter(())


def _check_same(a: Path, b: Path) -> None:
    """Raises RowError where two rows of one name are not the same."""
    if read_row_file(a) != read_row_file(b):
        raise RowError(
            f"{a.stem}: {a} and {b} are unlike rows of one run",
            "name one store in results=, or move one of the files away",
        )


def by_cell(question: Question, rows: Mapping[str, Row]) -> dict[tuple[str, int], Row | None]:
    """The row of every cell and seed, None where there is none."""
    return {place: rows.get(run.key) for place, run in question.identities.items()}


def stored_rows(results: Path, prefix: str) -> Iterator[Row]:
    """The rows whose run names start with a prefix, reruns last; no other file is opened.

    Raises RowError for a damaged one.
    """
    folder = results / "rows"
    runs = [path.stem for path in folder.glob("*.json") if path.name.startswith(prefix)]
    for run in sorted(runs, key=_original_first):
        yield read_row_file(folder / f"{run}.json")


def notes_path(results: Path, name: str) -> Path:
    """The file of the user's comments on an ablation."""
    return results / f"{name}.notes.md"


def read_notes(results: Path, name: str) -> str:
    """The user's comments on an ablation, `<results>/<name>.notes.md`; empty without the file."""
    path = notes_path(results, name)
    try:
        return path.read_text().strip() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def _notes_of(stores: Iterable[Path], name: str) -> str:
    """The user's comments in all stores, each once."""
    found = [read_notes(store, name) for store in stores]
    return "\n\n".join(dict.fromkeys(filter(None, found)))


def errors_in(runs: Path, question: Question) -> Callable[[Cell, int], str | None]:
    """A function from cell and seed to the last error message, None where it has not failed."""
    failures = read_failures(runs)

    def error_of(cell: Cell, seed: int) -> str | None:
        failure = failures.get(question.identities[cell.name, seed].key)
        return failure.error if failure else None

    return error_of


def _name_pattern(questions: Iterable[Question]) -> re.Pattern:
    """Matches the start of the run names that some ablations can have, up to the seed."""
    prefixes = {prefix for question in questions for prefix in question.prefixes}
    seeds = {seed for question in questions for seed in question.seeds}
    return re.compile(
        rf"(?:{'|'.join(map(re.escape, sorted(prefixes)))})(?:{'|'.join(map(str, sorted(seeds)))})-"
    )


def _original_first(run: str) -> tuple[bool, str]:
    return is_repetition(run), run


# ---- the index: run name -> data fingerprint, so that a large store is not read again for every
# table

_MIN_NEW_ROWS = 100  # below, reading them again costs less than rewriting the index


def _fingerprints_in(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(run, data fingerprint) of the rows of a folder whose run name is wanted, in no order.

    A row is written once, atomically, under a name of its own: a file with the size and mtime in
    the index is unchanged.

    Raises RowError for a damaged row that has to be read.
    """
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    index = cache_folder() / "rows" / f"{digest}.json"
    indexed, new = _read_index(index), {}
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(".json")]
    for entry in files:
        run = entry.name.removesuffix(".json")
        if not is_wanted(run):
            continue
        stat = entry.stat()
        size, mtime_ns, fingerprint = indexed.get(entry.name, (None, None, ""))
        if (size, mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            fingerprint = read_row_file(Path(entry.path)).data_fingerprint
            new[entry.name] = (stat.st_size, stat.st_mtime_ns, fingerprint)
        yield run, fingerprint
    if len(new) >= _MIN_NEW_ROWS:
        _write_index(index, indexed | new)


def _read_index(path: Path) -> dict[str, tuple[int, int, str]]:
    """(size in bytes, mtime in ns, data fingerprint) by file name; empty without a valid index."""
    try:
        content = json_file(path)
        rows = {
            name: (int(size), int(mtime_ns), str(fingerprint))
            for name, (size, mtime_ns, fingerprint) in content["rows"].items()
        }
        return rows if content["version"] == CACHE_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, rows: dict[str, tuple[int, int, str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"version": CACHE_VERSION, "rows": rows}).encode())
    except OSError:
        pass  # a cache: without it the next table is only slower
