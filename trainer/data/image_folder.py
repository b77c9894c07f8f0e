"""An image folder, `train/<class>/...` and `val/<class>/...`: the names it may have, and its files.

Links: a link to a file counts as that file, wherever it points; train/, val/ and class folders may
be links; a link to a folder further down is rejected, since it could form a cycle. A broken link
counts as a file of 0 bytes.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.base.errors import DataError

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",  # torchvision's
    ".npy",  # images of any number of channels
)  # fmt: skip
FOLDERS = {"train": ("train",), "val": ("val", "validation")}
# the validation split where there is no other, the first that is there
STAND_INS = ("valid", "test")
_OTHER_WORDS = {"train": ("train", "trn"), "val": ("val", "test", "dev", "eval")}  # of a split
_FILES_LOOKED_AT = 100  # in a folder that may be one of a class
_MOST_KINDS = 20  # of ignored files, named one by one
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)
_FILE_SETTLED_NS = SETTLED_NS


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
        name: sorted(path for path, _, _ in class_images(Path(root), name, {}, Counter()))
        for name in classes
    }
    for name in (name for name, paths in files.items() if not paths):
        raise no_image(Path(root) / name)
    return files


def no_image(folder: Path) -> DataError:
    """The error of a class without images."""
    return DataError(f"{folder}: has no image ({' '.join(EXTENSIONS)}); add at least one")


def folder_names(split: str) -> tuple[str, ...]:
    """The names that a split's folder may have, those that come first before the others."""
    return FOLDERS[split] + (STAND_INS if split == "val" else ())


def folder_of_split(root: Path, split: str) -> Path:
    """The folder of a split, the first of its names that is there. Raises DataError."""
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


def shared_classes(root: Path) -> tuple[str, ...]:
    """The class folders' names, which train and val must share."""
    train, val = (_class_names(folder_of_split(root, split)) for split in FOLDERS)
    for name in sorted(set(train) ^ set(val)):
        where = "train" if name in train else folder_of_split(root, "val").name
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


def extension_of(name: str) -> str:
    """A file name's extension in lower case and ASCII, with its dot."""
    ending = os.path.splitext(name)[1].lower()
    return ending.encode("ascii", "backslashreplace").decode() or "no extension"


def kinds_of(ignored: Counter[str]) -> dict[str, int]:
    """Counts by kind, those of the rare kinds together."""
    kinds = dict(sorted(ignored.most_common(_MOST_KINDS)))
    rest = ignored.total() - sum(kinds.values())
    return kinds | ({"others": rest} if rest else {})


def class_images(
    folder: Path, class_name: str, stamps: dict[str, int], ignored: Counter[str]
) -> Iterator[tuple[bytes, int, int]]:
    """(relative path, size, time) of every image below one class folder, in no order; counts what
    is none.
    """
    pending = [class_name]
    while pending:
        inside = pending.pop()
        stamp(folder, inside, stamps)
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


def stamp(folder: Path, inside: str, stamps: dict[str, int]) -> None:
    """Record a folder's time before it is listed; one changed just now gets a time that never
    matches, since a file system's clock may be too coarse to show a further change.
    """
    changed_ns = os.stat(folder / inside).st_mtime_ns
    stamps[inside] = changed_ns if time.time_ns() - changed_ns > SETTLED_NS else -1


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


def stat_of(path: bytes, folder: int) -> tuple[int, int]:
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
