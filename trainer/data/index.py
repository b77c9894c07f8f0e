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
import itertools
import json
import os
import re
import stat
import tempfile
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np

from trainer.base.errors import UserError
from trainer.base.json_text import json_file

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",  # torchvision's
    ".npy",  # images of any number of channels
)  # fmt: skip
FOLDERS = {"train": ("train",), "val": ("val", "validation")}
# the validation split where there is no other, the first that is there
STAND_INS = ("valid", "test")
_OTHER_WORDS = {"train": ("train", "trn"), "val": ("val", "test", "dev", "eval")}  # of a split
ARRAYS = {"paths": np.uint8, "offsets": np.int64, "labels": np.int32, "sizes": np.int64}
_TIMES = "times"  # int64, one more array: of each file, see _time_of
_LAYOUT = 3  # of the cached files, and what they list: a cache of another layout is stale
_STATS_AT_ONCE = 1 << 16  # bounds the memory of a check
_FILES_LOOKED_AT = 100  # in a folder that may be one of a class
_MOST_KINDS = 20  # of ignored files, named one by one
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)
_FILE_SETTLED_NS = _SETTLED_NS


class DataError(UserError):
    """A dataset is missing, damaged, or does not match its profile."""


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
                    if _stat_of(paths[first - ends[0] : end - ends[0]], folder) != known:
                        raise ValueError("a file has changed")
        finally:
            os.close(folder)


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


def has_class_folders(root: Path) -> bool:
    """Has it folders with images and no split, of this or another name? Only the first files of
    each folder are looked at.
    """
    if not os.path.isdir(root) or any(
        (Path(root) / name).is_dir() for names in FOLDERS.values() for name in names
    ):
        return False
    return not any(instead_of(root, split) for split in FOLDERS) and any(
        begins_with_images(Path(root) / name) for name in _class_names(root)
    )


def begins_with_images(folder: Path) -> bool:
    """Is one of the first files of a folder an image?"""
    try:
        with os.scandir(folder) as entries:
            first = itertools.islice(entries, _FILES_LOOKED_AT)
            return any(entry.name.lower().endswith(EXTENSIONS) for entry in first)
    except OSError:  # somebody else's folder
        return False


def class_files(root: Path) -> dict[str, list[bytes]]:
    """The images of a folder of class folders: sorted paths below it, by class.

    Raises DataError for an empty class, a link to a folder, and two classes of one name.
    """
    classes = _class_names(root)
    check_spelling(root, classes)
    files = {
        name: sorted(path for path, _, _ in _files(Path(root), name, {}, Counter()))
        for name in classes
    }
    for name in (name for name, paths in files.items() if not paths):
        raise _no_image(Path(root) / name)
    return files


def _no_image(folder: Path) -> DataError:
    return DataError(f"{folder}: has no image ({' '.join(EXTENSIONS)}); add at least one")


def open_index(root: Path, split: str, check_files: bool = True) -> Index:
    """The index of root/train or root/val (or validation; else valid or test), from the cache if no
    time of a folder, and no time or size of a file, has changed.

    check_files: look at every file, as a folder's time does not show that one was rewritten in
    place (6 us a file: 8 s for ImageNet, a minute and a half for 14 million). Without it the
    counts, names and classes are right, sizes may be old.

    Raises DataError without train/ or val/, for an empty class, for classes that differ between the
    two, and where the cache cannot be written.
    """
    folder = _split_folder(root, split)
    classes = _classes(root)
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
        found.state = hashlib.sha256(found.fingerprint.encode() + times.astype("<i8").tobytes())
        found.state = found.state.hexdigest()
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


def folder_names(split: str) -> tuple[str, ...]:
    """The names that a split's folder may have, those that come first before the others."""
    return FOLDERS[split] + (STAND_INS if split == "val" else ())


def _split_folder(root: Path, split: str) -> Path:
    for name in folder_names(split):
        if (Path(root) / name).is_dir():
            return Path(root) / name
    names = " or ".join(f"{name}/" for name in FOLDERS[split])
    raise DataError(
        f"{root}: has no {names}", f"use train/<class>/… and val/<class>/…{instead_of(root, split)}"
    )


def instead_of(root: Path, split: str) -> str:
    """` (rename Train/ to train/)` for what seems to be a split under another name, else empty."""
    for folder in (Path(root), Path(root) / "data"):
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            is_folder = (folder / name).is_dir()
            stem = name if is_folder else re.split(r"[^A-Za-z]", name)[0]
            if stem.lower().startswith(_OTHER_WORDS[split]) and stem not in folder_names(split):
                sign = "/" if is_folder else "…"
                return f" (rename {stem}{sign} to {split}{sign})"
    return ""


def _classes(root: Path) -> tuple[str, ...]:
    """The class folders' names, which train and val must share."""
    train, val = (_class_names(_split_folder(root, split)) for split in FOLDERS)
    for name in sorted(set(train) ^ set(val)):
        where = "train" if name in train else _split_folder(root, "val").name
        raise DataError(
            f"{root}: class {name!r} is in {where}/ only{spelled_otherwise(name, {*train, *val})}",
            "use the same classes in both",
        )
    if not train:
        raise DataError(
            f"{root}: train/ has no class folder; use train/<class>/… and val/<class>/…"
        )
    check_spelling(root, train)
    return train


def spelled_otherwise(name: str, names: Iterable[str]) -> str:
    """`, beside 'e\\u0301'` where names has the same in other characters (NFC, NFD) or case."""
    key = unicodedata.normalize("NFC", name).casefold()
    for other in sorted(names):
        if other != name and unicodedata.normalize("NFC", other).casefold() == key:
            return f" as {name!a}, beside {other!a}"
    return ""


def check_spelling(root: Path, classes: Iterable[str]) -> None:
    """Refuse two classes of one name in other Unicode characters: copied twice, by two systems.

    Raises DataError.
    """
    seen: dict[str, str] = {}
    for name in classes:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise DataError(
                f"{root}: two classes called {name!r}, as {twin!a} and {name!a}", "use one of them"
            )


def _class_names(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(
            sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
        )


def _scan(
    folder: Path, classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, int]]:
    """The arrays of a split, the modification time (ns) of each folder by relative path, and how
    many files of which kinds are not listed.
    """
    stamps: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    _stamp(folder, ".", stamps)
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and not entry.name.startswith("."):
                ignored[f"{extension_of(entry.name)} in no class folder"] += 1
    paths, offsets, labels, sizes = bytearray(), array("q", [0]), array("i"), array("q")
    times = array("q")
    for label, name in enumerate(classes):
        files = sorted(_files(folder, name, stamps, ignored))
        if not files:
            raise _no_image(folder / name)
        for path, size, changed in files:
            paths += path
            offsets.append(len(paths))
            labels.append(label)
            sizes.append(size)
            times.append(changed)
    columns = zip(
        (ARRAYS | {_TIMES: np.int64}).items(), (paths, offsets, labels, sizes, times), strict=True
    )
    arrays = {name: np.frombuffer(values, dtype) for (name, dtype), values in columns}
    return arrays, stamps, kinds_of(ignored)


def extension_of(name: str) -> str:
    """A file name's extension in lower case and ASCII, with its dot."""
    ending = os.path.splitext(name)[1].lower()
    return ending.encode("ascii", "backslashreplace").decode() or "no extension"


def kinds_of(ignored: Counter[str]) -> dict[str, int]:
    """Counts by kind, those of the rare kinds together."""
    kinds = dict(sorted(ignored.most_common(_MOST_KINDS)))
    rest = ignored.total() - sum(kinds.values())
    return kinds | ({"others": rest} if rest else {})


def _files(
    folder: Path, class_name: str, stamps: dict[str, int], ignored: Counter[str]
) -> Iterator[tuple[bytes, int, int]]:
    """(relative path, size, time) of every image below one class folder, in no order; counts what
    is none.
    """
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
                    yield os.fsencode(path), *_listed(entry)
                else:
                    ignored[extension_of(entry.name)] += 1


def _stamp(folder: Path, inside: str, stamps: dict[str, int]) -> None:
    """Record a folder's time before it is listed; one changed just now gets a time that never
    matches, since a file system's clock may be too coarse to show a further change.
    """
    changed_ns = os.stat(folder / inside).st_mtime_ns
    stamps[inside] = changed_ns if time.time_ns() - changed_ns > _SETTLED_NS else -1


def _listed(entry: os.DirEntry) -> tuple[int, int]:
    """(size, time) of a file; its time never matches where it changed just now."""
    try:
        about = entry.stat()
    except OSError:  # a broken or cyclic link
        return 0, 0
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would block
        raise DataError(f"{entry.path}: is a pipe or a device; remove it")
    newest = max(about.st_mtime_ns, about.st_ctime_ns)
    return about.st_size, _time_of(about) if time.time_ns() - newest > _FILE_SETTLED_NS else -1


def _stat_of(path: bytes, folder: int) -> tuple[int, int]:
    """(size, time) of a file in an open folder."""
    try:
        about = os.stat(path, dir_fd=folder)
    except OSError:
        return 0, 0
    return about.st_size, _time_of(about)


def _time_of(about: os.stat_result) -> int:
    """The modification and the change time in one number: a rewritten file may be given its old
    modification time back, but no program sets the other.
    """
    return (about.st_mtime_ns + about.st_ctime_ns) & (2**63 - 1)


def fingerprint_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over the arrays of ARRAYS, whatever the machine's byte order."""
    digest = hashlib.sha256()
    for name, dtype in ARRAYS.items():
        digest.update(arrays[name].astype(np.dtype(dtype).newbyteorder("<"), copy=False))
    return digest.hexdigest()
