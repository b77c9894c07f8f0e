"""Images packed many to a file, as tar shards, parquet files or a `datasets` folder: their cached
index.

The index is an image folder's with two more arrays: the file of each image, and its place in it. It
is cached as a folder's is, and stale where a file of either split has another time or size. Images
are read on demand; nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from trainer.base.cache import cache_folder
from trainer.base.commands import command, quoted
from trainer.base.errors import DataError
from trainer.base.json_text import json_file
from trainer.data.datasets import hf, parquet, shards
from trainer.data.datasets.formats import FORMATS, FileFormat
from trainer.data.datasets.listing import PLACES, classes_of, stands_for
from trainer.data.datasets.split import split_name
from trainer.data.image_folder import (
    SETTLED_NS,
    STAND_INS,
    begins_with_images,
    has_class_folders,
    instead_of,
    is_image_folder,
    kinds_of,
)
from trainer.data.index import Index, array_file, fingerprint_of, open_index, stem_of, store_index

_LAYOUT = "packed 2"  # of the cached files


class Shards(FileFormat):
    """See shards."""

    name, title, example = "shards", "tar shards", "{}-000000.tar or {}/*.tar"
    files, scan, reader = staticmethod(shards.files), staticmethod(shards.scan), shards.Reader


class Parquet(FileFormat):
    """See parquet."""

    name, title = "parquet", "parquet files"
    example = "data/{}-00000-of-00001.parquet or {}/*.parquet"
    files, scan, reader = staticmethod(parquet.files), staticmethod(parquet.scan), parquet.Reader


class Datasets(FileFormat):
    """See hf."""

    name, title, example = "hf", "a datasets folder", "a {}/ that save_to_disk wrote"
    files, scan, reader = staticmethod(hf.files), staticmethod(hf.scan), hf.Reader


class Member:
    """One image in a packed file, with the methods of a Path that image readers use."""

    def __init__(self, index: PackedIndex, i: int):
        self.index, self.i = index, i

    def __str__(self) -> str:
        file, name = self.index.place(self.i)
        return f"{file} ({name})"

    def read_bytes(self) -> bytes:
        """The image's file. Raises OSError or ValueError."""
        return self.index.content(self.i)


class PackedIndex(Index):
    """One split of packed images: class by class, in the order of the names' bytes.

    kind: the name of its format (see FORMATS). files: of the split, below the root. fingerprint: as
    the image folder <class>/<name> of the same files would have it.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        files: tuple[str, ...],
        stem: Path,
        classes: tuple[str, ...],
        fingerprint: str,
    ):
        super().__init__(root, stem, classes, fingerprint)
        self.kind, self.files = kind, files
        self._files, self._starts = (
            np.load(array_file(stem, name), mmap_mode="r", allow_pickle=False) for name in PLACES
        )
        self._reader = FORMATS[kind].reader([Path(root) / file for file in files])

    def __reduce__(self):
        """In another process it maps the same files again."""
        given = (self.folder, self.kind, self.files, self.stem_of, self.classes, self.fingerprint)
        return _again, (type(FORMATS[self.kind]), *given)

    @property
    def stand_in(self) -> str:
        first = Path(self.files[0])
        return next(
            (name for name in STAND_INS if name in first.parts or stands_for(first.name, name)), ""
        )

    @property
    def places_sha256(self) -> str:
        """sha256 (hex) over the places of the images."""
        return _places_sha256(self._files, self._starts)

    @property
    def root(self) -> Path:
        """The data set's folder: a split is some of its files."""
        return self.folder

    def path(self, i: int) -> Member:
        """Image i."""
        return Member(self, i)

    def place(self, i: int) -> tuple[Path, str]:
        """The file that holds image i, and the image's name with its class."""
        return self.folder / self.files[self._files[i]], os.fsdecode(self.name(i))

    def reading_order(self) -> np.ndarray:
        """File by file, in the order of the places: a parquet image costs its whole row group."""
        return np.lexsort((self._starts, self._files))

    def content(self, i: int) -> bytes:
        """The bytes of image i's file. Raises OSError or ValueError."""
        return self._reader.content(int(self._files[i]), int(self._starts[i]), int(self.sizes[i]))


def _again(_format: type[FileFormat], *given) -> PackedIndex:
    """_format: an argument so that unpickling imports, and thereby registers, the format."""
    return PackedIndex(*given)


def packed_kind(root: Path) -> str | None:
    """The name of the format in FORMATS that a folder holds; None for an image folder, or
    neither.

    Raises DataError where it holds two kinds.
    """
    found = [
        kind
        for kind in FORMATS
        if any(FORMATS[kind].files(root, split) for split in ("train", "val"))
    ]
    words = ["an image folder"] * is_image_folder(root) + [FORMATS[kind].title for kind in found]
    if len(words) > 1:
        raise DataError(
            f"{root}: holds {' and '.join(words)}; use one of them, in a folder of its own"
        )
    return found[0] if found else None


def holds_files(root: Path) -> bool:
    """Is it an image folder, or one of packed images? Raises DataError where it is both."""
    return packed_kind(root) is not None or is_image_folder(root)


def open_files(root: Path, split: str, check_files: bool = True) -> Index:
    """The index of one split, "train" or "val", of an image folder or of packed images.

    check_files: see open_index; the few files of packed images are looked at always.

    Raises DataError where neither is there, as open_index and open_packed do.
    """
    kind = packed_kind(root)
    if kind is None and not is_image_folder(root):
        refuse_unsplit(Path(root))
    return open_packed(root, kind, split) if kind else open_index(root, split, check_files)


def refuse_unsplit(root: Path) -> None:
    """Name what a folder without splits holds instead: class folders, images without a class,
    files of no split, or a folder of data, as the Hub has one per configuration. Raises DataError.
    """
    if has_class_folders(root):
        raise DataError(
            f"{root}: class folders without train/ and val/",
            f"use `{command('split', data=root)}`, then data={quoted(str(split_name(root)))}",
        )
    if begins_with_images(root):
        answers = f"{command('predict', images=root)} run=<run>"
        raise DataError(
            f"{root}: images without class folders, so without labels",
            f"to train on them, sort them into {root}/<class>/…, then"
            f" `{command('split', data=root)}`; for the answers of a trained model: `{answers}`",
        )
    if not root.exists():
        raise DataError(f"{root}: no such folder", "use data_dir=<the folder of the images>")
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        if is_image_folder(folder) or any(form.files(folder, "train") for form in FORMATS.values()):
            raise DataError(f"{root}: has no train/", f"use {folder}, which holds one")
    for path in sorted(root.glob("*")) + sorted(root.glob("*/*")):
        if path.suffix in (".tar", ".parquet", ".arrow"):
            raise DataError(
                f"{path}: belongs to no split; use train-000000{path.suffix} or "
                f"train/*{path.suffix} in {root}, and the same for val "
                "(for .arrow a DatasetDict saved by save_to_disk)"
            )


def open_packed(root: Path, kind: str, split: str) -> PackedIndex:
    """The index of one split, from the cache if no file has changed; else both splits are scanned.

    Raises DataError for a missing split, unreadable files, images without labels, and inconsistent
    classes.
    """
    files = {name: FORMATS[kind].files(root, name) for name in ("train", "val")}
    for name, paths in files.items():
        if not paths:
            raise DataError(
                f"{root}: {FORMATS[kind].title} without {name}",
                f"use {FORMATS[kind].example.replace('{}', name)}{instead_of(root, name)}",
            )
    record = (
        cache_folder()
        / "index"
        / hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
        / f"{split}.json"
    )
    stamps = _file_stamps(Path(root), files)
    settled = _settled_stamps(stamps)
    try:
        return _open_cached(Path(root), kind, record, stamps)
    except DataError:  # an optional library is missing
        raise
    except Exception:  # none yet, stale, or damaged in any way
        _build(Path(root), kind, files, record.parent, settled)
        return _open_cached(Path(root), kind, record, None)


def _open_cached(root: Path, kind: str, record: Path, stamps: dict | None) -> PackedIndex:
    """stamps: the files' current ones; None if the record was just written."""
    metadata = json_file(record)
    if (metadata["layout"], metadata["kind"], metadata["folder"]) != (
        _LAYOUT,
        kind,
        os.path.abspath(root),
    ):
        raise ValueError("another layout or folder")
    if stamps is not None and metadata["stamps"] != stamps:
        raise ValueError("stale")
    stem = stem_of(record, metadata["fingerprint"])
    found = PackedIndex(
        root,
        kind,
        tuple(metadata["files"]),
        stem,
        tuple(metadata["classes"]),
        metadata["fingerprint"],
    )
    found.check()
    if found.places_sha256 != metadata["places_sha256"]:
        raise ValueError("places do not match")
    found.ignored = metadata["ignored"][record.stem]
    if all(time_ns >= 0 for time_ns, *_ in metadata["stamps"].values()):
        found.state = hashlib.sha256(json.dumps(metadata["stamps"]).encode()).hexdigest()
    return found


def _build(root: Path, kind: str, files: dict[str, list[Path]], to: Path, stamps: dict) -> None:
    """Scan both splits, since they share their classes, and store an index of each."""
    listings = {}
    for split, paths in files.items():
        listings[split] = FORMATS[kind].scan(paths)
        if not listings[split].num_images:
            raise DataError(f"{paths[0]}: holds no image of {split}; add at least one")
    classes = classes_of(root, listings)
    for split, listing in listings.items():
        arrays = listing.arrays(classes)
        metadata = {
            "layout": _LAYOUT,
            "kind": kind,
            "folder": os.path.abspath(root),
            "files": [str(path.relative_to(root)) for path in files[split]],
            "classes": classes,
            "stamps": stamps,
            "ignored": {split: kinds_of(listing.ignored) for split, listing in listings.items()},
            "fingerprint": fingerprint_of(arrays),
            "places_sha256": _places_sha256(*(arrays[name] for name in PLACES)),
        }
        _store(root, arrays, metadata, to / f"{split}.json")


def _store(root: Path, arrays: dict[str, np.ndarray], metadata: dict, record: Path) -> None:
    try:
        store_index(arrays, metadata, record)
    except OSError as error:
        raise DataError(
            f"{record.parent}: the index of {root} cannot be written there ({error.strerror}); "
            "use XDG_CACHE_HOME=<a folder you may write to>"
        ) from None


def _file_stamps(root: Path, files: dict[str, list[Path]]) -> dict[str, list[int]]:
    """Times (ns) and size of every file that the index depends on, by path below the root."""
    names = [root / "classes.txt", *(path for paths in files.values() for path in paths)]
    abouts = {path: os.stat(path) for path in names if path.exists()}
    return {
        str(path.relative_to(root)): [about.st_mtime_ns, about.st_ctime_ns, about.st_size]
        for path, about in abouts.items()
    }


def _settled_stamps(stamps: dict[str, list[int]]) -> dict[str, list[int]]:
    """Stamps to store: a file that changed just now gets a time that never matches, since file
    systems may not show a further change.
    """
    now = time.time_ns()
    return {
        name: [time_ns if now - max(time_ns, changed_ns) > SETTLED_NS else -1, changed_ns, size]
        for name, (time_ns, changed_ns, size) in stamps.items()
    }


def _places_sha256(files: np.ndarray, starts: np.ndarray) -> str:
    digest = hashlib.sha256(files.astype("<i4", copy=False))
    digest.update(starts.astype("<i8", copy=False))
    return digest.hexdigest()
