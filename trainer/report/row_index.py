"""Which images each row of a large store was made from, remembered, so that only the rows of a table are read.

A row is written once and under its own name, so a file of the same size and time is the same row. The index lies in the user's
cache folder; what it does not know, or knows of another file, is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.data.index import cache_folder
from trainer.runs.results import read_row_file

_LAYOUT = 2  # of the cached file
_LEAST_NEW = 100  # rows that are worth a new index


def fingerprints_of(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(run, data fingerprint) of each row of a folder whose name is wanted, in no order.

    Raises RowError for a damaged row that has to be read.
    """
    record = (
        cache_folder()
        / "rows"
        / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
    )
    known, new = _read(record), {}
    with os.scandir(folder) as entries:
        wanted = [
            entry
            for entry in entries
            if entry.name.endswith(".json") and is_wanted(entry.name[: -len(".json")])
        ]
    for entry in wanted:
        stat = entry.stat()
        size, time_ns, fingerprint = known.get(entry.name, (None, None, None))
        if (size, time_ns) != (stat.st_size, stat.st_mtime_ns):
            fingerprint = read_row_file(Path(entry.path)).data_fingerprint
            new[entry.name] = (stat.st_size, stat.st_mtime_ns, fingerprint)
        yield entry.name[: -len(".json")], fingerprint
    if len(new) >= _LEAST_NEW:
        _write(record, known | new)


def _read(record: Path) -> dict[str, tuple[int, int, str]]:
    try:
        content = json_file(record)
        rows = {
            name: (int(size), int(time_ns), str(fingerprint))
            for name, (size, time_ns, fingerprint) in content["rows"].items()
        }
        return rows if content["layout"] == _LAYOUT else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no index, or a damaged one, is none


def _write(record: Path, rows: dict) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"layout": _LAYOUT, "rows": rows}).encode())
    except OSError:
        pass  # without it, it is only slower
