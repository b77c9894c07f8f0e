"""Images and masks in a folder that Hugging Face's `datasets` wrote (save_to_disk)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trainer.base.errors import DataError
from trainer.base.json_text import json_file
from trainer.data.datasets import hf
from trainer.data.datasets.layouts import Layout
from trainer.data.image_folder import STAND_INS
from trainer.tasks.segmentation.masks import CLASSES_FILE, MaskedSet, read_classes

# Names of columns of the Hub's sets; where nothing else is an image, any other is the mask's.
_IMAGES = ("image", "img", "pixel_values")
_MASKS = ("mask", "annotation", "label", "labels", "segmentation", "segmentation_mask")


class Cell(NamedTuple):
    """One file of a table, read as a Path is."""

    images: TableSet
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.images.folder} ({self.column} of row {self.row})"

    def read_bytes(self) -> bytes:
        """Raises ValueError where the table has none."""
        return self.images.cells[self.column].content(self.row)


@dataclass(frozen=True)
class TableSet(MaskedSet):
    """A MaskedSet of the rows of a split; images and masks are the names that their files had.

    folder: of the split. columns: names of those of images and of masks in its table.
    """

    folder: Path = Path()
    columns: tuple[str, str] = ("", "")

    @cached_property
    def cells(self) -> dict[str, hf.Cells]:
        """The two columns by name; memory-mapped by every process for itself."""
        dataset, _ = hf.open_split(self.folder)
        return {column: hf.Cells(dataset, column) for column in self.columns}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cells"}

    def file_sizes(self) -> Iterable[int]:
        return [size for column in self.columns for size in self.cells[column].sizes()]

    def path(self, i: int) -> Cell:
        return Cell(self, self.columns[0], i)

    def mask_path(self, i: int) -> Cell:
        return Cell(self, self.columns[1], i)


class MaskTables(Layout):
    """A folder of save_to_disk with two columns of images, one of them the masks'; classes.txt
    beside its splits, as in a folder of masks.
    """

    name: ClassVar[str] = "mask tables"
    task: ClassVar[str] = "segmentation"

    def holds(self, root: Path) -> bool:
        if not (root / "dataset_dict.json").is_file():
            return False
        files = hf.files(root, "train")
        if not files or _columns_of(files[0].parent) is None:
            return False
        # masks beside a class of each image: the file of the masks' classes says which is meant
        return not _has_labels(files[0].parent) or (root / CLASSES_FILE).is_file()

    def find(self, root: Path, split: str, num_channels: int) -> TableSet:
        files = hf.files(root, split)
        if not files:
            raise DataError(f"{root}: has no {split}", f"write a DatasetDict with {split}")
        folder = files[0].parent
        columns = _columns_of(folder)
        if columns is None:
            raise DataError(
                f"{folder}: has not a column of images and one of masks, as train has",
                "write all splits with the same columns",
            )
        classes, table = read_classes(root / CLASSES_FILE)
        dataset, _ = hf.open_split(folder)
        images, masks = (_names_of(hf.Cells(dataset, column), column) for column in columns)
        stand_in = folder.name if folder.name in STAND_INS else ""
        known = (classes, table, num_channels, stand_in)
        return TableSet(root, images, masks, *known, folder=folder, columns=columns)


def _columns_of(folder: Path) -> tuple[str, str] | None:
    """The names of the columns of a split's images and masks, by its dataset_info.json; None where
    no two can be told.
    """
    kinds = _kinds_of(folder)
    images = [name for name, kind in kinds.items() if kind == "Image"]
    image = next((name for name in _IMAGES if name in images), None)
    others = [name for name in images if name != image]
    named = [name for name in _MASKS if name in others]
    if not named and len(others) == 1 and not _has_labels(folder):
        named = others
    return (image, named[0]) if image and named else None


def _has_labels(folder: Path) -> bool:
    """Has each image of a split a class?"""
    return "ClassLabel" in _kinds_of(folder).values()


def _kinds_of(folder: Path) -> dict[str, str | None]:
    """The types of a split's columns by their names; empty where they cannot be read."""
    try:
        features = json_file(folder / "dataset_info.json")["features"]
        return {name: one.get("_type") for name, one in features.items() if isinstance(one, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _names_of(cells: hf.Cells, column: str) -> tuple[str, ...]:
    """Of the files in a column: column/row, and the name that the table has."""
    names: Sequence[str] = cells.names()
    return tuple(f"{column}/{row:09d} {name}".rstrip() for row, name in enumerate(names))
