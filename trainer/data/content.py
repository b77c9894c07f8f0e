"""The digest of a split's very bytes: what a fingerprint of names and sizes cannot tell apart.

Every file is read once per machine: the digest is cached with the index, and holds for as long as
no file has another time or size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trainer.base.cores import num_cores
from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.data.datasets.beton import BetonSet
from trainer.data.datasets.builtin import FolderSet, ImageSet
from trainer.data.datasets.layouts import TargetSet
from trainer.data.datasets.members import content_of
from trainer.data.decode import BadImage, Readable
from trainer.data.index import Index

_FILES_AT_ONCE = 1024  # between two calls of a reader who may be asked to stop
_DIGEST_BYTES = 16
_MOST_THREADS = 16


def content_digest(images: ImageSet) -> Iterator[str | None]:
    """sha256 (hex) over the bytes of every image's file, in order: the last value given, after None
    for each part that has been read. Empty where it is not known.

    A .beton has that of the files that it was written from, any other set its fingerprint.
    """
    if isinstance(images, FolderSet):
        yield from _digest_of_files(images.index)
    elif isinstance(images, TargetSet):
        yield from _digest_of_paths(images.files())
    else:
        yield images.facts.content if isinstance(images, BetonSet) else images.fingerprint


def differ(before: str | None, now: str | None) -> bool:
    """Are two contents known, and not the same?"""
    return bool(before and now and before != now)


def _digest_of_files(index: Index) -> Iterator[str | None]:
    """A file that cannot be read counts as no bytes: training finds it."""
    record = _record_of(index)
    known = _cached(record, index)
    if known is not None:
        yield known
        return
    digests = np.zeros((index.num_images, _DIGEST_BYTES), np.uint8)
    order = index.reading_order()
    with ThreadPoolExecutor(min(_MOST_THREADS, num_cores())) as pool:
        for start in range(0, len(order), _FILES_AT_ONCE):
            places = order[start : start + _FILES_AT_ONCE]
            found = b"".join(pool.map(lambda i: _digest_of(index, int(i)), places))
            digests[places] = np.frombuffer(found, np.uint8).reshape(-1, _DIGEST_BYTES)
            yield None
    digest = hashlib.sha256(digests.tobytes()).hexdigest()
    if index.state is not None:
        with contextlib.suppress(OSError):  # a full disk: it is read again next time
            write_atomically(record, json.dumps({"state": index.state, "sha256": digest}).encode())
    yield digest


def _digest_of_paths(paths: Sequence[Readable]) -> Iterator[str | None]:
    """The same of files without an index, read each time."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(_MOST_THREADS, num_cores())) as pool:
        for start in range(0, len(paths), _FILES_AT_ONCE):
            whole.update(b"".join(pool.map(_digest_at, paths[start : start + _FILES_AT_ONCE])))
            yield None
    yield whole.hexdigest()


def _digest_of(index: Index, i: int) -> bytes:
    return _digest_at(index.path(i))


def _digest_at(path: Readable) -> bytes:
    try:
        content = content_of(path)
    except BadImage:
        content = b""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _record_of(index: Index) -> Path:
    return index.stem_of.with_name(f"{index.stem_of.name.partition('-')[0]}.content.json")


def _cached(record: Path, index: Index) -> str | None:
    try:
        found = json_file(record)
        return str(found["sha256"]) if found["state"] == index.state is not None else None
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged in any way
        return None
