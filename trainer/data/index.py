"""The index of an image folder: built once, cached, memory-mapped, the same arrays in every
process.

A path is a range of one byte array, so 1.3 million of them cost no Python objects.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from trainer.base.cache import cache_folder
from trainer.base.errors import DataError
from trainer.base.json_text import json_file
from trainer.data.image_folder import (
    STAND_INS,
    class_images,
    extension_of,
    folder_of_split,
    kinds_of,
    no_image,
    shared_classes,
    stamp,
    stat_of,
)

ARRAYS = {"paths": np.uint8, "offsets": np.int64, "labels": np.int32, "sizes": np.int64}
_TIMES = "times"  # int64, one more array: of each file, as image_folder has it
_LAYOUT = 3  # of the cached files, and what they list: a cache of another layout is stale
_STATS_AT_ONCE = 1 << 16  # bounds the memory of a check


class Index:
    """One split of an image folder: class by class, in the order of the paths' bytes.

    labels: [N] int32, indices into `classes`. sizes: [N] int64, bytes. classes: folder names,
    sorted. fingerprint: sha256 (hex) over relative path, label and size of every file; not over the
    pixels. ignored: files that are no images here, counted by extension. state: digest of the
    files' times, by which what was read from them may be cached; None where some are too young.
    """

    ignored: Mapping[str, int] = MappingProxyType({})
    state: str | None = None

    def __init__(self, folder: Path, stem: Path, classes: tuple[str, ...], fingerprint: str):
        self.folder, self.classes, self.fingerprint = folder, classes, fingerprint
        self.stem_of = stem
        self._paths, self._offsets, self.labels, self.sizes = (
            np.load(array_file(stem, name), mmap_mode="r", allow_pickle=False) for name in ARRAYS
        )

    def __reduce__(self):
        """In another process it maps the same files again: the arrays are not copied."""
        return Index, (self.folder, self.stem_of, self.classes, self.fingerprint)

    def check(self) -> None:
        """Read all arrays once. Raises ValueError where they do not match the fingerprint."""
        arrays = dict(
            zip(ARRAYS, (self._paths, self._offsets, self.labels, self.sizes), strict=True)
        )
        if any(values.dtype != ARRAYS[name] or values.ndim != 1 for name, values in arrays.items()):
            raise ValueError("wrong types of arrays")
        if fingerprint_of(arrays) != self.fingerprint or self.labels.max(initial=0) >= len(
            self.classes
        ):
            raise ValueError("arrays do not match the fingerprint")

    @property
    def num_images(self) -> int:
        """Files of the split."""
        return len(self.labels)

    def path(self, i: int) -> Path:
        """The path of image i."""
        return self.folder / os.fsdecode(self.name(i))

    @property
    def root(self) -> Path:
        """The data set's folder, which holds all of its splits."""
        return self.folder.parent

    def name(self, i: int) -> bytes:
        """Image i's path below the folder."""
        return self._paths[self._offsets[i] : self._offsets[i + 1]].tobytes()

    @property
    def stand_in(self) -> str:
        """The name of the split that is taken for validation, where none is called so; else
        empty.
        """
        return self.folder.name if self.folder.name in STAND_INS else ""

    def reading_order(self) -> np.ndarray:
        """The images [N] in the order in which all are read fastest."""
        return np.arange(self.num_images)

    def check_files(self, times: np.ndarray) -> None:
        """Raises ValueError where a file's time or size is not the listed one: one stat each."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(0, self.num_images, _STATS_AT_ONCE):
                part = slice(start, start + _STATS_AT_ONCE)
                ends = self._offsets[start : start + _STATS_AT_ONCE + 1].tolist()
                paths = self._paths[ends[0] : ends[-1]].tobytes()
                listed = zip(self.sizes[part].tolist(), times[part].tolist(), strict=True)
                for first, end, known in zip(ends, ends[1:], listed, strict=False):
                    if stat_of(paths[first - ends[0] : end - ends[0]], folder) != known:
                        raise ValueError("a file has changed")
        finally:
            os.close(folder)


def open_index(root: Path, split: str, check_files: bool = True) -> Index:
    """The index of root/train or root/val (or validation; else valid or test), from the cache if no
    time of a folder, and no time or size of a file, has changed.

    check_files: look at every file, as a folder's time does not show that one was rewritten in
    place (6 us a file: 8 s for ImageNet, a minute and a half for 14 million). Without it the
    counts, names and classes are right, sizes may be old.

    Raises DataError without train/ or val/, for an empty class, for classes that differ between the
    two, and where the cache cannot be written.
    """
    folder = folder_of_split(root, split)
    classes = shared_classes(root)
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    record = cache_folder() / "index" / name / f"{split}.json"
    try:
        return _open_cached(folder, record, check_files)
    except Exception:  # none yet, stale, or damaged in any way
        return build_index(folder, classes, record)


def build_index(folder: Path, classes: tuple[str, ...], record: Path) -> Index:
    """Scan the class folders, store the arrays, then the record beside them, and open the index."""
    arrays, stamps, ignored = _scan(folder, classes)
    fingerprint = fingerprint_of(arrays)
    metadata = {
        "layout": _LAYOUT,
        "folder": os.path.abspath(folder),
        "classes": classes,
        "stamps": stamps,
        "ignored": ignored,
    }
    try:
        store_index(arrays, metadata | {"fingerprint": fingerprint}, record)
    except OSError as error:
        raise DataError(
            f"{record.parent}: the index of {folder} cannot be written there ({error.strerror}); "
            "use XDG_CACHE_HOME=<a folder you may write to>"
        ) from None
    found = Index(folder, stem_of(record, fingerprint), classes, fingerprint)
    return _with_state(found, arrays[_TIMES], ignored)


def _with_state(found: Index, times: np.ndarray, ignored: Mapping[str, int]) -> Index:
    found.ignored = ignored
    if times.min(initial=0) >= 0:
        digest = hashlib.sha256(found.fingerprint.encode() + times.astype("<i8").tobytes())
        found.state = digest.hexdigest()
    return found


def store_index(arrays: dict[str, np.ndarray], metadata: dict, record: Path) -> None:
    """Write the arrays under names with their fingerprint, then the record that refers to them;
    delete older arrays.

    Each file is written atomically; two processes that build the same index write the same bytes.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    stem = stem_of(record, metadata["fingerprint"])
    for name, values in arrays.items():
        with _atomic_file(array_file(stem, name)) as file:
            np.save(file, values)
    with _atomic_file(record) as file:
        file.write(json.dumps(metadata).encode())
    for old in record.parent.glob(f"{record.stem}-*.npy"):
        if not old.name.startswith(stem.name):
            old.unlink(missing_ok=True)


class _atomic_file:
    """A file that gets its name when it is complete."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self):
        self.file = open(self.part, "wb")
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink()


def stem_of(record: Path, fingerprint: str) -> Path:
    """The common stem of an index's array files; record: the file that refers to them."""
    return record.with_name(f"{record.stem}-{fingerprint[:16]}")


def array_file(stem: Path, name: str) -> Path:
    """The file of one array of an index."""
    return stem.with_name(f"{stem.name}.{name}.npy")


def _open_cached(folder: Path, record: Path, check_files: bool) -> Index:
    metadata = json_file(record)
    if metadata["layout"] != _LAYOUT or metadata["folder"] != os.path.abspath(folder):
        raise ValueError("another layout or folder")
    found = Index(
        folder,
        stem_of(record, metadata["fingerprint"]),
        tuple(metadata["classes"]),
        metadata["fingerprint"],
    )
    with ThreadPoolExecutor(1) as pool:  # hashes the arrays while stat() runs here
        checked = pool.submit(found.check)
        if any(
            os.stat(os.path.join(folder, name)).st_mtime_ns != stamp
            for name, stamp in metadata["stamps"].items()
        ):
            raise ValueError("stale")
        times = np.load(array_file(found.stem_of, _TIMES), mmap_mode="r", allow_pickle=False)
        if check_files:
            found.check_files(times)
        checked.result()
    return _with_state(found, times, metadata["ignored"])


def _scan(
    folder: Path, classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, int]]:
    """The arrays of a split, the modification time (ns) of each folder by relative path, and how
    many files of which kinds are not listed.
    """
    stamps: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    stamp(folder, ".", stamps)
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and not entry.name.startswith("."):
                ignored[f"{extension_of(entry.name)} in no class folder"] += 1
    paths, offsets, labels, sizes = bytearray(), array("q", [0]), array("i"), array("q")
    times = array("q")
    for label, name in enumerate(classes):
        files = sorted(class_images(folder, name, stamps, ignored))
        if not files:
            raise no_image(folder / name)
        for path, size, changed in files:
            paths += path
            offsets.append(len(paths))
            labels.append(label)
            sizes.append(size)
            times.append(changed)
    columns: Any = zip(
        (ARRAYS | {_TIMES: np.int64}).items(), (paths, offsets, labels, sizes, times), strict=True
    )
    arrays = {name: np.frombuffer(values, dtype) for (name, dtype), values in columns}
    return arrays, stamps, kinds_of(ignored)


def fingerprint_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over the arrays of ARRAYS, whatever the machine's byte order."""
    digest = hashlib.sha256()
    for name, dtype in ARRAYS.items():
        values: Any = arrays[name].astype(np.dtype(dtype).newbyteorder("<"), copy=False)
        digest.update(values)  # an array is a buffer, which its type does not say
    return digest.hexdigest()
