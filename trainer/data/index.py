"""The index of an image folder: built once, cached, memory-mapped, the same arrays in every
process.

A path is a range of one byte array, so 1.3 million of them cost no Python objects.

Links: a link to a file counts as that file, wherever it points; train/, val/ and class folders may
be links; a link to a folder further down is rejected, since it could form a cycle. A broken link
counts as a file of 0 bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
import tempfile
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trainer.base.errors import UserError
from trainer.base.json_text import json_file

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",  # torchvision's
    ".npy",  # images of any number of channels
)  # fmt: skip
FOLDERS = {"train": ("train",), "val": ("val", "validation")}
ARRAYS = {"paths": np.uint8, "offsets": np.int64, "labels": np.int32, "sizes": np.int64}
_LAYOUT = 2  # of the cached files, and what they list: a cache of another layout is stale
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)


class DataError(UserError):
    """A dataset is missing, damaged, or does not match its profile."""


class Index:
    """One split of an image folder: class by class, in the order of the paths' bytes.

    labels: [N] int32, indices into `classes`. sizes: [N] int64, bytes. classes: folder names,
    sorted. fingerprint: sha256 (hex) over relative path, label and size of every file; not over the
    pixels.
    """

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

    def name(self, i: int) -> bytes:
        """Image i's path below the folder."""
        return self._paths[self._offsets[i] : self._offsets[i + 1]].tobytes()


def cache_folder() -> Path:
    """This program's cache folder of the user; a temporary one for a user without a home that can
    be written (a container's --user 12345).
    """
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) / "rsb" if named else _home_cache() or temporary_cache()


def cache_note() -> str:
    """Where caches are, if not where they are looked for; else the empty string."""
    if os.environ.get("XDG_CACHE_HOME") or _home_cache():
        return ""
    return (
        f"no home to write to: caches are in {temporary_cache()}; XDG_CACHE_HOME=<a folder> keeps"
        " them"
    )


def _home_cache() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        return None
    folder = home / ".cache" / "rsb"
    there = next((path for path in (folder, folder.parent, home) if path.is_dir()), None)
    return folder if there and os.access(there, os.W_OK | os.X_OK) else None


@functools.cache
def temporary_cache() -> Path:
    """The folder rsb-<user> among the system's temporary files, or a fresh one where that name is
    another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"rsb-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="rsb-"))


def is_image_folder(root: Path) -> bool:
    """Has it train/<class>/ folders?"""
    train = Path(root) / "train"
    return train.is_dir() and bool(_class_names(train))


def open_index(root: Path, split: str) -> Index:
    """The index of root/train or root/val (or validation), from the cache if the folders' times
    have not changed.

    A file rewritten in place does not change its folder's time: the index then keeps its old size.

    Raises DataError without train/ or val/, for an empty class, for classes that differ between the
    two, and where the cache cannot be written.
    """
    folder = _split_folder(root, split)
    classes = _classes(root)
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    record = cache_folder() / "index" / name / f"{split}.json"
    try:
        return _open_cached(folder, record)
    except Exception:  # none yet, stale, or damaged in any way
        return build_index(folder, classes, record)


def build_index(folder: Path, classes: tuple[str, ...], record: Path) -> Index:
    """Scan the class folders, store the arrays, then the record beside them, and open the index."""
    arrays, stamps = _scan(folder, classes)
    fingerprint = fingerprint_of(arrays)
    metadata = {
        "layout": _LAYOUT,
        "folder": os.path.abspath(folder),
        "classes": classes,
        "stamps": stamps,
    }
    try:
        store_index(arrays, metadata | {"fingerprint": fingerprint}, record)
    except OSError as error:
        raise DataError(
            f"{record.parent}: the index of {folder} cannot be written there ({error.strerror}); "
            "use XDG_CACHE_HOME=<a folder you may write to>"
        ) from None
    return Index(folder, stem_of(record, fingerprint), classes, fingerprint)


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


def _open_cached(folder: Path, record: Path) -> Index:
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
        checked.result()
    return found


def _split_folder(root: Path, split: str) -> Path:
    for name in FOLDERS[split]:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    names = " or ".join(f"{name}/" for name in FOLDERS[split])
    raise DataError(f"{root}: has no {names}; use train/<class>/… and val/<class>/…")


def _classes(root: Path) -> tuple[str, ...]:
    """The class folders' names, which train and val must share."""
    train, val = (_class_names(_split_folder(root, split)) for split in FOLDERS)
    for name in sorted(set(train) ^ set(val)):
        where = "train" if name in train else _split_folder(root, "val").name
        raise DataError(f"{root}: class {name!r} is in {where}/ only; use the same classes in both")
    if not train:
        raise DataError(
            f"{root}: train/ has no class folder; use train/<class>/… and val/<class>/…"
        )
    return train


def _class_names(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(
            sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
        )


def _scan(folder: Path, classes: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The arrays of a split, and the modification time (ns) of each folder by relative path."""
    stamps: dict[str, int] = {}
    _stamp(folder, ".", stamps)
    paths, offsets, labels, sizes = bytearray(), array("q", [0]), array("i"), array("q")
    for label, name in enumerate(classes):
        files = sorted(_files(folder, name, stamps))
        if not files:
            raise DataError(
                f"{folder / name}: has no image ({' '.join(EXTENSIONS)}); add at least one"
            )
        for path, size in files:
            paths += path
            offsets.append(len(paths))
            labels.append(label)
            sizes.append(size)
    columns = zip(ARRAYS.items(), (paths, offsets, labels, sizes), strict=True)
    return {name: np.frombuffer(values, dtype) for (name, dtype), values in columns}, stamps


def _files(folder: Path, class_name: str, stamps: dict[str, int]) -> Iterator[tuple[bytes, int]]:
    """(relative path, size) of every image below one class folder, in no order."""
    pending = [class_name]
    while pending:
        inside = pending.pop()
        _stamp(folder, inside, stamps)
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if entry.is_symlink():
                        raise DataError(
                            f"{folder / path}: is a link to a folder; use the folder itself"
                        )
                    pending.append(path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield os.fsencode(path), _size(entry)


def _stamp(folder: Path, inside: str, stamps: dict[str, int]) -> None:
    """Record a folder's time before it is listed; one changed just now gets a time that never
    matches, since a file system's clock may be too coarse to show a further change.
    """
    changed_ns = os.stat(folder / inside).st_mtime_ns
    stamps[inside] = changed_ns if time.time_ns() - changed_ns > _SETTLED_NS else -1


def _size(entry: os.DirEntry) -> int:
    try:
        about = entry.stat()
    except OSError:  # a broken or cyclic link
        return 0
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would block
        raise DataError(f"{entry.path}: is a pipe or a device; remove it")
    return about.st_size


def fingerprint_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over the arrays of ARRAYS, whatever the machine's byte order."""
    digest = hashlib.sha256()
    for name, dtype in ARRAYS.items():
        digest.update(arrays[name].astype(np.dtype(dtype).newbyteorder("<"), copy=False))
    return digest.hexdigest()
