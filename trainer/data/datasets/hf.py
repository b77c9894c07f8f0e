"""Folders written by Hugging Face's `datasets` (save_to_disk), opened by it: arrow files,
memory-mapped, read row by row.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from trainer.base.errors import DataError
from trainer.base.json_text import json_file
from trainer.data.datasets.columns import add_rows, bytes_of, columns_of
from trainer.data.datasets.listing import Listing
from trainer.data.image_folder import folder_names

_METADATA_FILES = ("state.json", "dataset_info.json")


def files(root: Path, split: str) -> list[Path]:
    """The files of a split's folder: two that describe it, then the arrow files.

    Raises DataError for a folder of one split alone.
    """
    root = Path(root)
    if (root / "state.json").is_file() and not (root / "dataset_dict.json").is_file():
        raise DataError(
            f"{root}: holds one split only; use a DatasetDict with train and val or validation"
        )
    if not (root / "dataset_dict.json").is_file():
        return []
    folder = next(
        (
            root / name
            for name in folder_names(split)
            if (root / name / _METADATA_FILES[0]).is_file()
        ),
        None,
    )
    return (
        []
        if folder is None
        else [*(folder / name for name in _METADATA_FILES), *sorted(folder.glob("*.arrow"))]
    )


def scan(paths: list[Path]) -> Listing:
    """Every image of the split with its label. Raises DataError for what is damaged, or has no
    images or labels.
    """
    folder = paths[0].parent
    dataset, columns = _open(folder)
    table, listing, first = dataset.data, Listing(columns.class_names), 0
    images, labels = table.column(columns.image), table.column(columns.label)
    for chunk in images.chunks:
        add_rows(listing, folder, chunk, labels.slice(first, len(chunk)), 0, first)
        first += len(chunk)
    return listing


def _open(folder: Path):
    """The split as `datasets` opens it, and its columns."""
    dataset, features = open_split(folder)
    return dataset, columns_of(folder, dataset.data.schema, features)


def open_split(folder: Path):
    """The split in a folder as `datasets` opens it, and its features. Raises DataError."""
    try:
        import datasets  # optional dependency
    except ImportError:
        raise DataError(
            f"{folder.parent}: needs the package datasets, which is not installed; "
            'run .venv/bin/python -m pip install "rsb[hf]"'
        ) from None
    try:
        for part in json_file(folder / _METADATA_FILES[0])["_data_files"]:
            if not (folder / part["filename"]).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"refers to {part['filename']} outside the folder")
        dataset = datasets.load_from_disk(str(folder))
        features = dataset.features.to_dict()
    except Exception as error:  # whatever datasets raises for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{folder}: damaged ({reason}); write or download the folder again"
        ) from None
    if len(dataset) != dataset.data.num_rows:
        raise DataError(
            f"{folder}: holds a selection of rows; call flatten_indices() before save_to_disk"
        )
    return dataset, features


class Reader:
    """The bytes of images in memory-mapped arrow files, whose page cache all processes share."""

    def __init__(self, paths: list[Path]):
        dataset, columns = _open(paths[0].parent)
        self._cells = Cells(dataset, columns.image)

    def content(self, file: int, start: int, size: int) -> bytes:
        """Those of one image, in row `start`. Raises ValueError."""
        content = self._cells.content(start)
        if len(content) != size:
            raise ValueError("the file has changed since it was listed")
        return content


class Cells:
    """The files in one column of a split that `datasets` has opened, by row."""

    def __init__(self, dataset, column: str):
        self._column = dataset.data.column(column)
        self._chunks = [bytes_of(chunk) for chunk in self._column.chunks]
        self._ends = list(accumulate(map(len, self._chunks)))

    def content(self, row: int) -> bytes:
        """The bytes of a file. Raises ValueError where there are none."""
        chunk = bisect_right(self._ends, row)
        place = row - (self._ends[chunk - 1] if chunk else 0)
        content = self._chunks[chunk][place].as_buffer()
        if content is None:
            raise ValueError("the table has no bytes of it")
        return content.to_pybytes()

    def names(self) -> list[str]:
        """Of all files, empty where the table has none."""
        found: list[str] = []
        for chunk in self._column.chunks:
            has_paths = hasattr(chunk, "field") and chunk.type.get_field_index("path") >= 0
            names = chunk.field("path").to_pylist() if has_paths else [None] * len(chunk)
            found += [name or "" for name in names]
        return found

    def sizes(self) -> list[int]:
        """Of all files, in bytes."""
        import pyarrow.compute  # an optional dependency

        lengths = (pyarrow.compute.binary_length(chunk) for chunk in self._chunks)
        return [size or 0 for chunk in lengths for size in chunk.to_pylist()]
