"""Packed images: the files of a split, the images found in them, and the classes of both splits.

Numbered as an image folder of the same images would be: class by class, within a class in the order
of the names' bytes. So the same images have the same numbers, random draws and fingerprint however
they are packed.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from trainer.base.errors import DataError
from trainer.data.image_folder import FOLDERS, STAND_INS, check_spelling, spelled_otherwise
from trainer.data.index import ARRAYS

PLACES = {"files": np.int32, "starts": np.int64}  # of each image: which file, and where in it
_SPLITS = {name: split for split, names in FOLDERS.items() for name in names}
_WORD = "|".join(sorted(_SPLITS, key=len, reverse=True))
_NAMED = re.compile(rf"(?<![a-z])({_WORD})(?![a-z])")
_NUMBERED = re.compile(rf"(?<![a-z])({_WORD})[-_.]?\d")
_OF = re.compile(r"-\d+-of-(\d+)")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Listing:
    """The images of one split in file order. class_names: of the labels 0, 1, ... if stored in the
    files. ignored: files packed beside the images, counted by extension.
    """

    def __init__(self, class_names: tuple[str, ...] | None = None):
        self.class_names = class_names
        self.ignored: Counter[str] = Counter()
        self.labels_found: dict[int | str, int] = {}
        self._names, self._ends = bytearray(), array("q", [0])
        self._labels, self._sizes, self._files, self._starts = (
            array("i"),
            array("q"),
            array("i"),
            array("q"),
        )

    @property
    def num_images(self) -> int:
        """Images listed so far."""
        return len(self._labels)

    def add(self, name: str, label: int | str, size: int, file: int, start: int) -> None:
        """Add one image. name: within its class. label: a number, or the class's name."""
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._labels.append(self.labels_found.setdefault(label, len(self.labels_found)))
        self._sizes.append(size)
        self._files.append(file)
        self._starts.append(start)

    def arrays(self, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The arrays of an index in its order, with the places of the images."""
        numbers = [
            label if isinstance(label, int) else classes.index(label) for label in self.labels_found
        ]
        labels = np.array(numbers, np.int32)[np.frombuffer(self._labels, np.int32)]
        order = np.fromiter(chain.from_iterable(self._by_name(labels)), np.int64, len(labels))
        labels, paths, ends = labels[order], bytearray(), np.zeros(len(order) + 1, np.int64)
        prefixes = [os.fsencode(f"{name}/") for name in classes]
        for place, (i, label) in enumerate(zip(order.tolist(), labels.tolist(), strict=True)):
            paths += prefixes[label] + self._name(i)
            ends[place + 1] = len(paths)
        sizes, files, starts = (
            np.array(values)[order] for values in (self._sizes, self._files, self._starts)
        )
        columns = (np.frombuffer(paths, np.uint8), ends, labels, sizes, files, starts)
        return {
            name: column.astype(kind, copy=False)
            for (name, kind), column in zip((ARRAYS | PLACES).items(), columns, strict=True)
        }

    def _by_name(self, labels: np.ndarray) -> Iterable[list[int]]:
        """The positions of each class's images sorted by name (stable)."""
        by_class = np.argsort(labels, kind="stable")
        ends = np.flatnonzero(np.diff(labels[by_class])) + 1
        for places in np.split(by_class, ends):
            yield sorted(places.tolist(), key=self._name)

    def _name(self, i: int) -> bytes:
        return bytes(self._names[self._ends[i] : self._ends[i + 1]])


def files_of(root: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split, sorted: all of root/<split>/, or those in root or root/data named after
    it.

    An archive beside a folder of its name is ignored: that folder was unpacked from it.

    Raises DataError for files in two places, names of two splits, missing parts, and compressed
    files without an uncompressed one.
    """
    root, found = Path(root), {}
    for name in FOLDERS[split]:
        found[root / name] = _within(root / name, suffix)
    for folder in (root, root / "data"):
        for path in _within(folder, suffix):
            name = _split_name(path.name.partition(suffix)[0].lower(), path)
            if _SPLITS.get(name) == split:
                found.setdefault(folder / f"{name}…{suffix}", []).append(path)
    places = [place for place, paths in found.items() if paths]
    if not places and split == "val" and files_of(root, "train", suffix):
        found = _of_stand_in(root, suffix)
        places = list(found)
    if len(places) > 1:
        raise DataError(
            f"{root}: images of {split} both in {places[0]} and in {places[1]}; "
            "keep them in one of the two"
        )
    files = found[places[0]] if places else []
    for path in files:
        if path.suffix in _COMPRESSED:
            raise DataError(
                f"{path}: compressed, so its images cannot be read one by one; "
                f"decompress it to {path.stem}"
            )
    _check_parts(files)
    return files


def _of_stand_in(root: Path, suffix: str) -> dict[Path, list[Path]]:
    """The files of the first of STAND_INS that a folder has: in root/<name>, or named after it."""
    for name in STAND_INS:
        found = {root / name: _within(root / name, suffix)}
        for folder in (root, root / "data"):
            named = [path for path in _within(folder, suffix) if stands_for(path.name, name)]
            found[folder / f"{name}…{suffix}"] = named
        found = {place: paths for place, paths in found.items() if paths}
        if found:
            return found
    return {}


def stands_for(file: str, name: str) -> bool:
    """Is a file named after a split: test.tar, test-0000.tar?"""
    return re.match(rf"{name}(?:[-_.]?\d|\.)", file.lower()) is not None


def _within(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    names = {name for name in os.listdir(folder) if not name.startswith(".")}
    plain = {name for name in names if name.endswith(suffix)}
    for ending in _COMPRESSED:
        plain |= {
            name
            for name in names
            if name.endswith(suffix + ending) and name.removesuffix(ending) not in plain
        }
    return [
        folder / name for name in sorted(plain) if not (folder / name.partition(suffix)[0]).is_dir()
    ]


def _split_name(stem: str, path: Path) -> str | None:
    """The split in a file name: train-0000, set-validation-07, or the split's name alone."""
    if stem in _SPLITS:
        return stem
    numbered, named = _NUMBERED.findall(stem), set(_NAMED.findall(stem))
    if numbered and len(named | set(numbered)) > 1:
        raise DataError(
            f"{path}: named after both {' and '.join(sorted(named))}; use a name with one of them"
        )
    return numbered[0] if numbered else None


def _check_parts(files: list[Path]) -> None:
    declared = {int(found[1]) for path in files if (found := _OF.search(path.stem))}
    if declared and declared != {len(files)}:
        expected = " or ".join(map(str, sorted(declared)))
        raise DataError(
            f"{files[0]}: {len(files)} files, but {expected} by their names; add the missing ones"
        )


def classes_of(root: Path, listings: dict[str, Listing]) -> tuple[str, ...]:
    """The classes of both splits: named by the files or classes.txt, else the labels themselves.

    Raises DataError for labels without a class, classes without a training image, and splits that
    differ.
    """
    train, val = listings["train"], listings["val"]
    labels = set(train.labels_found) | set(val.labels_found)
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise DataError(f"{root}: some labels are numbers, some names; use only one of the two")
    declared = _declared(root, train.class_names, val.class_names)
    if declared is None:
        _check_shared(root, set(train.labels_found), set(val.labels_found))
    is_numbers = kinds == {int}
    classes = declared or (_numbered(root, labels) if is_numbers else tuple(sorted(labels)))
    known = range(len(classes)) if is_numbers else classes
    check_spelling(root, classes)
    unknown = sorted(label for label in labels if label not in known)
    if unknown:
        raise DataError(
            f"{root}: label {unknown[0]!r} is not among the {len(classes)} named classes; "
            "use one of them"
        )
    for number, label in enumerate(known):
        if label not in train.labels_found:
            raise DataError(
                f"{root}: class {classes[number]!r} has no image in train; add at least one"
            )
    return classes


def _check_shared(root: Path, train: set, val: set) -> None:
    for label in sorted(train ^ val):
        where = "train" if label in train else "val"
        raise DataError(
            f"{root}: class {str(label)!r} is in {where} only"
            + spelled_otherwise(str(label), map(str, train | val)),
            "use the same classes in both, or add a classes.txt",
        )


def _numbered(root: Path, labels: set[int]) -> tuple[str, ...]:
    if labels != set(range(len(labels))):
        odd = (
            min(labels)
            if min(labels) < 0
            else next(i for i in range(len(labels)) if i not in labels)
        )
        problem = f"label {odd}" if odd < 0 else f"no label {odd}, but label {max(labels)}"
        raise DataError(f"{root}: {problem}; use consecutive numbers from 0, or add a classes.txt")
    return tuple(map(str, range(len(labels))))


def _declared(root: Path, *named: tuple[str, ...] | None) -> tuple[str, ...] | None:
    path = Path(root) / "classes.txt"
    written = _lines(path) if path.is_file() else None
    declared = {names for names in (*named, written) if names is not None}
    if len(declared) > 1:
        raise DataError(
            f"{root}: class names differ among train, val and classes.txt; "
            "use the same names in all"
        )
    return declared.pop() if declared else None


def _lines(path: Path) -> tuple[str, ...]:
    """The names in a classes.txt, one per line."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); write one class name per line"
        ) from None
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise DataError(
            f"{path}: has an empty line or a duplicate name; write one class name per line"
        )
    return tuple(names)
