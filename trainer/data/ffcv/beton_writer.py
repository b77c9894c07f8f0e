"""Writing a .beton: in the order of the source, the same bytes every time, resumed where it was
stopped.

Every image is decoded as the torch loader decodes it, stored, and decoded again from what was
stored; at the end the file is read back and every image's CRC-32 is checked. Only then does the
file get its name.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from trainer.base.disk import write_atomically
from trainer.base.errors import DataError, UserError
from trainer.data.content import content_digest
from trainer.data.datasets import beton
from trainer.data.datasets.beton import Beton, BetonSet
from trainer.data.datasets.builtin import FolderSet, ImageSet
from trainer.data.decode import Planes
from trainer.recipe.profiles import Profile

_IMAGES_AT_ONCE = 256  # encoded but not yet written: bounds the memory, and what a stop loses
_LARGEST_SIDE_PX = 65_535
_NOTE = np.dtype([("sample", beton.SAMPLE), ("place", beton.PLACE), ("is_exact", "?")])


@dataclass(frozen=True)
class Storage:
    """How images are stored: see Beton's fields of these names.

    Raises UserError for values outside their ranges.
    """

    max_side_px: int = 0
    jpeg_share: float | None = None
    quality: int = 90
    side_px: int = 0

    def __post_init__(self):
        for name, side_px in (("max_side", self.max_side_px), ("side", self.side_px)):
            if not (side_px == 0 or 8 <= side_px <= _LARGEST_SIDE_PX):
                raise UserError(
                    f"{name}={side_px}: out of range; "
                    f"valid: 0 (original size), 8 .. {_LARGEST_SIDE_PX} px"
                )
        if self.jpeg_share is not None and not 0 <= self.jpeg_share <= 1:
            raise UserError(f"jpeg_share={self.jpeg_share}: out of range; valid: 0 .. 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality={self.quality}: out of range; valid: 1 .. 100 (90 is usual)")

    def resized(self, image: Image.Image) -> Image.Image:
        """An image with its longer side at most max_side_px and its shorter one at most side_px, by
        PIL's bicubic, which smooths what it makes smaller; itself where it is no larger.
        """
        shrink = min(
            (self.max_side_px or max(image.size)) / max(image.size),
            (self.side_px or min(image.size)) / min(image.size),
        )
        if shrink >= 1:
            return image
        size = [max(1, round(side * shrink)) for side in image.size]
        return image.resize(size, Image.Resampling.BICUBIC)

    def is_jpeg(self, i: int, was_jpeg: bool) -> bool:
        """Is image i stored as JPEG? A share is spread evenly over the order, and so over the
        classes.
        """
        if self.jpeg_share is None:
            return was_jpeg
        return int((i + 1) * self.jpeg_share) > int(i * self.jpeg_share)


class _Stored(NamedTuple):
    """One image as it is written. is_exact: its pixels are the source's."""

    mode: int
    size: tuple[int, int]
    source_size: tuple[int, int]
    content: bytes
    is_exact: bool


class _Part:
    """The unfinished file; a second file, .notes, records the images written, so that the next call
    can resume.
    """

    def __init__(self, path: Path, key: str, labels: np.ndarray):
        self.path, self.key = path, key.encode()
        self.notes = path.with_name(path.name + ".notes")
        self.images = np.zeros(len(labels), _NOTE)
        self.images["sample"]["label"] = labels
        self.images["place"]["sample_id"] = np.arange(len(labels))
        first_page = beton.SAMPLES_START + len(labels) * beton.SAMPLE.itemsize
        self.num_done, self.end = 0, -(-first_page // beton.PAGE_BYTES) * beton.PAGE_BYTES

    def resume(self) -> None:
        """Resume an earlier call with the same images and storage, else start anew."""
        try:
            noted = self.notes.read_bytes()
            # without a last note that is incomplete
            noted = noted[: len(noted) - (len(noted) - len(self.key)) % _NOTE.itemsize]
            num_bytes = self.path.stat().st_size
        except OSError:
            noted, num_bytes = b"", 0
        done = np.frombuffer(noted[len(self.key) :], _NOTE)[: len(self.images)]
        ends = done["place"]["ptr"] + done["place"]["size"]
        if noted.startswith(self.key) and len(done) and ends[-1] <= num_bytes:
            self.images[: len(done)], self.num_done, self.end = done, len(done), int(ends[-1])
        else:
            self.path.unlink(missing_ok=True)
            self.notes.write_bytes(self.key)

    def add(self, file: BinaryIO, stored: _Stored) -> None:
        """Append one image's bytes."""
        i, size = self.num_done, len(stored.content)
        left = -self.end % beton.PAGE_BYTES or beton.PAGE_BYTES
        first = self.end if size <= left else self.end + left
        file.seek(first)
        file.write(stored.content)
        note, (width, height) = self.images[i], stored.source_size
        note["sample"]["image"] = (stored.mode, *stored.size, first)
        note["sample"]["size"], note["sample"]["crc"] = (
            height << 32 | width,
            zlib.crc32(stored.content),
        )
        note["place"]["ptr"], note["place"]["size"], note["is_exact"] = first, size, stored.is_exact
        self.num_done, self.end = i + 1, first + size

    def settle(self, file: BinaryIO, num_settled: int) -> None:
        """Flush the images after the first num_settled to disk, then their notes."""
        _sync(file)
        with open(self.notes, "ab") as notes:
            notes.write(self.images[num_settled : self.num_done].tobytes())
            _sync(notes)

    def finish(self, file: BinaryIO) -> int:
        """Write header, metadata and the table of places; returns the size of the file."""
        header = np.zeros(1, beton.HEADER)
        header[0] = (
            beton.VERSION,
            len(beton.BETON_FIELDS),
            beton.PAGE_BYTES,
            len(self.images),
            self.end,
        )
        fields = np.zeros(len(beton.BETON_FIELDS), beton.FIELD)
        for field, (name, type_id) in zip(fields, beton.BETON_FIELDS.items(), strict=True):
            field["type_id"], field["name"][: len(name)] = (
                type_id,
                np.frombuffer(name.encode(), np.uint8),
            )
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + self.images["sample"].tobytes())
        file.seek(self.end)
        file.write(self.images["place"].tobytes())
        file.truncate()
        _sync(file)
        return file.tell()


def write_beton(
    image_set: ImageSet,
    folder: Path,
    split: str,
    profile: Profile,
    storage: Storage = Storage(),
    num_threads: int = 1,
    each: Callable[[], None] = lambda: None,
) -> Beton:
    """Write one split into a folder, resuming a stopped call with the same images; does nothing if
    it is complete.

    each: called after every image. Decoders and encoders release the GIL, so threads share the
    work.

    Raises BadImage for the first image that does not decode, UserError for what the format cannot
    store, and where writing fails.
    """
    if profile.channels not in (1, 3):
        raise UserError(
            f"{profile.name}: {profile.channels} channels, but a .beton stores 1 or 3; "
            "use loader=torch"
        )
    path = beton.beton_file(folder, split)
    words = (
        beton.LAYOUT,
        image_set.fingerprint,
        _content_of(image_set),
        storage,
        profile.name,
        profile.mean,
        profile.std,
        image_set.classes,
    )
    key = hashlib.sha256(repr(words).encode()).hexdigest()
    there = _finished(path, image_set, storage, profile)
    if there is not None:
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = _Part(path.with_name(f".{path.name}.part"), key, image_set.labels)
        num_bytes = _write_images(part, image_set, storage, num_threads, each)
        metadata = _metadata_of(part, num_bytes, image_set, split, profile, storage)
        _read_back(BetonSet(part.path, metadata, profile.channels))
        # first, so that no reader meets a new .beton with an old .json
        path.with_suffix(".json").unlink(missing_ok=True)
        os.replace(part.path, path)
        write_atomically(path.with_suffix(".json"), metadata.as_json())
        part.notes.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); "
            "check free space and permissions, or use out=<another folder>"
        ) from None
    return metadata


def _write_images(
    part: _Part, image_set: ImageSet, storage: Storage, num_threads: int, each: Callable[[], None]
) -> int:
    part.resume()
    for _ in range(part.num_done):
        each()
    with (
        open(part.path, "r+b" if part.num_done else "w+b") as file,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        while part.num_done < image_set.num_images:
            first = part.num_done
            places = range(first, min(first + _IMAGES_AT_ONCE, image_set.num_images))
            try:
                for stored in pool.map(lambda i: _stored(image_set, i, storage), places):
                    part.add(file, stored)
                    each()
            finally:
                part.settle(file, first)
        return part.finish(file)


def _metadata_of(
    part: _Part, num_bytes: int, image_set: ImageSet, split: str, profile: Profile, storage: Storage
) -> Beton:
    is_lossless = bool(part.images["is_exact"].all())
    changes = (is_lossless, *vars(storage).values())
    return Beton(
        layout=beton.LAYOUT,
        split=split,
        profile=profile.name,
        num_images=image_set.num_images,
        num_bytes=num_bytes,
        channels=profile.channels,
        mean=profile.mean,
        std=profile.std,
        max_side_px=storage.max_side_px,
        jpeg_share=storage.jpeg_share,
        quality=storage.quality,
        side_px=storage.side_px,
        is_lossless=is_lossless,
        source=image_set.fingerprint,
        fingerprint=beton.beton_fingerprint(image_set.fingerprint, *changes),
        content=beton.beton_fingerprint(_content_of(image_set), *changes),
        samples_sha256=beton.samples_digest(part.images["sample"]),
        classes=tuple(image_set.classes),
    )


def _content_of(image_set: ImageSet) -> str:
    *_, digest = content_digest(image_set)
    return digest or ""


def _finished(path: Path, image_set: ImageSet, storage: Storage, profile: Profile) -> Beton | None:
    """The metadata of an existing .beton if this call would write the same."""
    try:
        metadata = beton.open_beton(path.parent, path.stem, profile.channels).facts
    except DataError:
        return None
    asked = (
        image_set.fingerprint,
        *vars(storage).values(),
        profile.name,
        profile.mean,
        profile.std,
    )
    found = (
        metadata.source,
        metadata.max_side_px,
        metadata.jpeg_share,
        metadata.quality,
        metadata.side_px,
        metadata.profile,
        metadata.mean,
        metadata.std,
    )
    if found != asked:
        return None
    # the same names and sizes, of files that may have been written anew
    changes = (metadata.is_lossless, *vars(storage).values())
    content = beton.beton_fingerprint(_content_of(image_set), *changes)
    return metadata if metadata.content in ("", content) else None


def _stored(image_set: ImageSet, i: int, storage: Storage) -> _Stored:
    """Image i as it is written, decoded again as a check."""
    image = image_set.read(i)
    if isinstance(image, Planes):
        raise UserError(
            f"image {i}: {len(image.planes)} channels, but a .beton stores 1 or 3; use loader=torch"
        )
    source_size = image.size
    if max(source_size) > _LARGEST_SIDE_PX:
        raise UserError(
            f"image {i}: {source_size[0]} x {source_size[1]} px, but sides in a .beton are at most "
            f"{_LARGEST_SIDE_PX}; use max_side=500"
        )
    own = _own_bytes(image_set, i, image.mode)
    image = storage.resized(image)
    is_whole = image.size == source_size
    if not storage.is_jpeg(i, own is not None):
        stored = _Stored(
            beton.RAW, image.size, source_size, image.convert("RGB").tobytes(), is_whole
        )
    elif own is not None and is_whole:
        stored = _Stored(beton.JPEG, image.size, source_size, own, True)
    else:
        stored = _Stored(
            beton.JPEG, image.size, source_size, _as_jpeg(image, storage.quality), False
        )
    if len(stored.content) > beton.PAGE_BYTES:
        raise UserError(
            f"image {i}: {len(stored.content)} bytes, but a .beton's page has {beton.PAGE_BYTES}; "
            "use max_side=2000, or side=256 with format=raw"
        )
    about = {"mode": stored.mode, "width": stored.size[0], "height": stored.size[1]}
    beton.decoded_pixels(stored.content, about, f"image {i}, as it is stored,")
    return stored


def _own_bytes(image_set: ImageSet, i: int, mode: str) -> bytes | None:
    """The file of image i if it is a JPEG that any decoder decodes to PIL's pixels."""
    if not isinstance(image_set, FolderSet):
        return None
    content = image_set.index.path(i).read_bytes()
    if not content.startswith(b"\xff\xd8"):
        return None
    own_mode = Image.open(io.BytesIO(content)).mode
    return content if own_mode == "L" or (own_mode == mode == "RGB") else None


def _as_jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _read_back(found: BetonSet) -> None:
    """Raises DataError where the disk does not return what was written."""
    for i in range(found.num_images):
        found.content(i)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
