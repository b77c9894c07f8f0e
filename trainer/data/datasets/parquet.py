"""Parquet files as the Hugging Face Hub lays them out, read by pyarrow:
data/train-00000-of-00005.parquet, or train/*.parquet.

A row group is the smallest unit that can be read: one image costs its group, unless that is cached.
The Hub's have 100 rows. The first opening reads all files once, since the metadata lack the images'
sizes.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from trainer.base.errors import DataError
from trainer.base.json_text import json_of
from trainer.data.datasets.columns import Columns, add_rows, bytes_of, columns_of
from trainer.data.datasets.listing import Listing, files_of

_ROWS_AT_ONCE = 256
_LARGEST_GROUP_MIB = 256  # a worker holds one at least
_HELD_BYTES = 64 * 2**20  # of cached groups, in each process
_OPEN_FILES = 64


def files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, sorted by name."""
    return files_of(root, split, ".parquet")


def scan(paths: list[Path]) -> Listing:
    """Every image of the files with its label. Raises DataError for what is damaged, or has no
    images or labels.
    """
    listing = None
    for number, path in enumerate(paths):
        try:
            file = _open(path)
            columns = _columns(path, file)
            _check_groups(path, file, columns)
            if listing is None:
                listing = Listing(columns.class_names)
            elif listing.class_names != columns.class_names:
                raise DataError(
                    f"{path}: other class names than in {paths[0]}; use the same in all files"
                )
            _list(listing, path, file, columns, number)
        except DataError:
            raise
        except Exception as error:  # whatever pyarrow raises for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: damaged ({reason}); download the file again") from None
    return listing


def _list(listing: Listing, path: Path, file, columns: Columns, number: int) -> None:
    first = 0
    for batch in file.iter_batches(
        _ROWS_AT_ONCE, columns=[columns.image, columns.label], use_threads=False
    ):
        add_rows(
            listing, path, batch.column(columns.image), batch.column(columns.label), number, first
        )
        first += batch.num_rows


def _pyarrow():
    try:
        import pyarrow.parquet  # optional dependency
    except ImportError:
        raise DataError(
            "parquet files need pyarrow, which is not installed; "
            'run .venv/bin/python -m pip install "rsb[parquet]"'
        ) from None
    return pyarrow.parquet


def _open(path: Path):
    return _pyarrow().ParquetFile(path, memory_map=True, pre_buffer=False)


def _columns(path: Path, file) -> Columns:
    written = (file.schema_arrow.metadata or {}).get(b"huggingface")
    features = json_of(written).get("info", {}).get("features", {}) if written else {}
    return columns_of(path, file.schema_arrow, features)


def _leaf(columns: Columns) -> str:
    return f"{columns.image}.bytes" if columns.is_struct else columns.image


def _check_groups(path: Path, file, columns: Columns) -> None:
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        parts = (group.column(i) for i in range(group.num_columns))
        mib = (
            sum(
                part.total_uncompressed_size
                for part in parts
                if part.path_in_schema == _leaf(columns)
            )
            / 2**20
        )
        if mib > _LARGEST_GROUP_MIB:
            raise DataError(
                f"{path}: a row group of {mib:.0f} MiB, read whole for each image, where at most "
                f"{_LARGEST_GROUP_MIB} are allowed; write it with row_group_size=100, "
                "or use tar shards"
            )


class Reader:
    """The bytes of images in parquet files; each process caches the row groups last read."""

    def __init__(self, paths: list[Path]):
        _pyarrow()
        self._paths = paths
        self._start()

    def _start(self) -> None:
        """Fresh state in each process: after a fork, the parent's lock or files may be in use."""
        self._process, self._lock, self._held = os.getpid(), threading.Lock(), OrderedDict()
        self._opened = lru_cache(maxsize=_OPEN_FILES)(self._open)

    def content(self, file: int, start: int, size: int) -> bytes:
        """Those of one image, in row `start` of the file. Raises OSError or ValueError."""
        if self._process != os.getpid():
            self._start()
        with self._lock:
            _, _, ends = self._opened(file)
            group = bisect_right(ends, start)
            content = (
                self._group(file, group)[start - (ends[group - 1] if group else 0)]
                .as_buffer()
                .to_pybytes()
            )
        if len(content) != size:
            raise ValueError("the file has changed since it was listed")
        return content

    def _open(self, file: int) -> tuple:
        """(file, its columns, the row after the last of each group)."""
        opened = _open(self._paths[file])
        groups = (
            opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)
        )
        return opened, _columns(self._paths[file], opened), list(accumulate(groups))

    def _group(self, file: int, group: int):
        """The images' bytes of one group."""
        found = self._held.pop((file, group), None)
        if found is None:
            opened, columns, _ = self._opened(file)
            table = opened.read_row_group(group, columns=[_leaf(columns)], use_threads=False)
            found = bytes_of(table.column(columns.image).combine_chunks())
        self._held[file, group] = found
        while (
            len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > _HELD_BYTES
        ):
            self._held.popitem(last=False)
        return found
