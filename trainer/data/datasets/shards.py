"""Tar shards, in the layout of WebDataset or with a folder per class: listed by tarfile, read in
place.

    <key>.jpg with <key>.cls, or with <key>.json that has a "label", a number or a name; the key
    ends at the name's first dot
    <class>/<file>, with or without train/ or val/ before it

Nothing is ever extracted: a member's name is text, and no file of that name is opened or written.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from trainer.base.errors import DataError
from trainer.base.json_text import json_of
from trainer.data.datasets.listing import Listing, files_of
from trainer.data.image_folder import EXTENSIONS, FOLDERS, extension_of

_LABELS = ("cls", "json")  # the first there is counts
_LARGEST_LABEL_BYTES = 2**20
_LARGEST_IMAGE_MIB = 1024
_OPEN_FILES = 128
_MOST_AFTER_END = 2**20  # tar pads to a whole record with zeros
_SPLIT_FOLDERS = {name for names in FOLDERS.values() for name in names}


class _Member(NamedTuple):
    name: str
    start: int
    size: int


def files(root: Path, split: str) -> list[Path]:
    """The shards of a split, sorted by name."""
    return files_of(root, split, ".tar")


def scan(shards: list[Path]) -> Listing:
    """Every image of the shards with its label.

    Raises DataError for what is damaged, for an image without a label or twice, a label without an
    image, and for names that lead out of the tar.
    """
    listing = Listing()
    for number, path in enumerate(shards):
        images: list[_Member] = []
        others: dict[str, list[str]] = {}
        labels: dict[str, dict[str, _Member]] = {}
        for member in _members(path):
            key, _, ending = _key(member.name)
            if member.name.lower().endswith(EXTENSIONS):
                images.append(member)
            elif ending in _LABELS:
                labels.setdefault(key, {})[ending] = member
            else:
                others.setdefault(key, []).append(member.name)
                listing.ignored[extension_of(member.name)] += 1
        _check_once(
            path, images, is_keyed := any(_key(image.name)[0] in labels for image in images)
        )
        _check_pictured(path, images, labels, others)
        for image, label, name in _labelled(path, images, labels if is_keyed else None):
            listing.add(name, label, image.size, number, image.start)
    return listing


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file in a tar, in order. Raises DataError for what is damaged or leads
    out of the tar.
    """
    reader = Reader([path])
    for member in _members(path):
        yield member.name, reader.content(0, member.start, member.size)


def _members(path: Path) -> Iterator[_Member]:
    """The files in a tar, in order; all of their bytes are there."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield from _checked(path, tar)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, " ".join(str(error).split()) or type(error).__name__) from None


def _checked(path: Path, tar: tarfile.TarFile) -> Iterator[_Member]:
    num_bytes, last = os.path.getsize(path), -1
    while (about := tar.next()) is not None:
        tar.members = []  # it would remember all of them
        if about.offset_data <= last:
            raise _damaged(path, "a header that leads back")
        last = about.offset_data
        name = about.name.removeprefix("./")
        if about.isdir() or any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{path}: holds {name!r}, a name that leads out of the tar; use names within it"
            )
        if not about.isreg() or about.issparse():
            raise DataError(
                f"{path}: {name!r} is a link, a sparse file or a device; store the file itself "
                "(tar --dereference --hard-dereference)"
            )
        if not 0 <= about.size <= num_bytes - about.offset_data:
            raise _damaged(
                path,
                f"{name!r} has {about.size} bytes, but only "
                f"{max(0, num_bytes - about.offset_data)} are in the file",
            )
        yield _Member(name, about.offset_data, about.size)
    _check_end(path, tar.offset, num_bytes)


def _check_end(path: Path, end: int, num_bytes: int) -> None:
    """Check the end mark: tarfile stops silently at a damaged header, or where the file was
    truncated between two members.
    """
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(_MOST_AFTER_END)
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]):
        raise _damaged(path, f"no end mark at byte {end} of {num_bytes}")
    if end + len(rest) < num_bytes or any(rest):
        raise _damaged(path, "data after its end mark, as in concatenated tars")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged ({reason}); create or download the tar again")


def _key(name: str) -> tuple[str, str, str]:
    """(key, ".", ending) as WebDataset divides a name: at the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    key, dot, ending = file.partition(".")
    return f"{folder}{slash}{key}", dot, ending.lower()


def _check_once(path: Path, images: list[_Member], is_keyed: bool) -> None:
    seen = set()
    for image in images:
        name = _key(image.name)[0] if is_keyed else image.name
        if name in seen:
            raise DataError(f"{path}: two images called {name!r}; give each its own name")
        seen.add(name)


def _check_pictured(
    path: Path, images: list[_Member], labels: dict, others: dict[str, list[str]]
) -> None:
    """Refuse a sample with a label and no image: it would be left out of the data set in
    silence.
    """
    pictured = {_key(image.name)[0] for image in images}
    missing = [
        key
        for key, written in labels.items()
        if key not in pictured and ("cls" in written or key in others)  # not a lone readme.json
    ]
    if missing:
        beside = ", ".join(others.get(missing[0], [])[:3]) or "nothing else"
        raise DataError(
            f"{path}: {len(missing)} labelled samples without an image, the first {missing[0]!r} "
            f"with {beside}; use one of {' '.join(EXTENSIONS)}"
        )


def _labelled(
    path: Path, images: list[_Member], labels: dict | None
) -> Iterator[tuple[_Member, int | str, str]]:
    """(image, label, name within its class) of a tar's images. labels: by key; None: folders are
    classes.
    """
    file = _Open(path)
    is_split_first = all(
        image.name.count("/") > 1 and image.name.split("/")[0] in _SPLIT_FOLDERS for image in images
    )
    for image in images:
        key = _key(image.name)[0]
        if labels is not None and key in labels:
            yield image, _label(path, file, labels[key]), image.name
            continue
        class_name, slash, name = (
            image.name.partition("/")[2] if is_split_first else image.name
        ).partition("/")
        if labels is not None or not slash:
            raise DataError(
                f"{path}: {image.name!r} has no label; use {key}.cls, "
                f'{key}.json with a "label", or <class>/<file>'
            )
        yield image, class_name, name


def _label(path: Path, file: _Open, written: dict[str, _Member]) -> int | str:
    ending = next(ending for ending in _LABELS if ending in written)
    member = written[ending]
    try:
        if member.size > _LARGEST_LABEL_BYTES:
            raise ValueError(f"{member.size} bytes")
        text = _read(file, member.start, member.size).decode()
        found = json_of(text)["label"] if ending == "json" else text
        return shard_label(found)
    except (ValueError, KeyError, TypeError) as error:
        reason = 'no "label"' if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"{path}: {member.name!r} holds no label ({reason}); "
            "use a number from 0, or a class name"
        ) from None


def shard_label(found) -> int | str:
    """Parse a label: digits alone are a number. Raises ValueError for what is neither number nor
    name.
    """
    if isinstance(found, str) and (text := found.strip()):
        return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text
    if isinstance(found, int) and not isinstance(found, bool) and abs(found) < 10**9:
        return found
    raise ValueError(f"{str(found)[:40]!r}")


class _Open:
    """An open file, closed when it is garbage-collected."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def _read(file: _Open, start: int, size: int) -> bytes:
    """A byte range of a file; pread leaves alone the file offset that forked processes share."""
    parts, missing = [], size
    while missing:
        part = os.pread(file.number, missing, start + size - missing)
        if not part:
            raise ValueError(f"the shard ends {missing} bytes early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class Reader:
    """The bytes of images in shards."""

    def __init__(self, shards: list[Path]):
        self._shards = shards
        self._opened = lru_cache(maxsize=_OPEN_FILES)(_Open)

    def content(self, file: int, start: int, size: int) -> bytes:
        """Those of one image. Raises OSError or ValueError."""
        if size > _LARGEST_IMAGE_MIB * 2**20:
            raise ValueError(f"more than {_LARGEST_IMAGE_MIB} MiB")
        return _read(self._opened(self._shards[file]), start, size)
