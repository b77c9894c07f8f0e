"""A .beton file, one split in ffcv's format, and what stands beside it in a .json; read here
without ffcv.

Four fields: the image, its label, its size in the source (height << 32 | width) and the CRC-32 of
its bytes. Images lie in the order of the source, as JPEG or as plain RGB; one of a single channel
as RGB of three equal ones. Source of the layout: ffcv 1.0.2, ffcv/types.py; tests read the files
with ffcv.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.base.commands import command, program
from trainer.base.errors import DataError, UserError
from trainer.base.json_text import json_file
from trainer.data.datasets.packed import holds_files
from trainer.data.decode import BadImage, Pixels
from trainer.data.jpeg import resized

VERSION = 2  # of ffcv's format
LAYOUT = 1  # of our fields and of the .json
# no sample crosses a page boundary, so that ffcv's own page cache can read the file too
PAGE_BYTES = 1 << 24
JPEG, RAW = 0, 1  # ffcv's modes
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
# name: ffcv's type, of which 1 is a 64-bit number
BETON_FIELDS = {
    "image": 2,
    "label": 1,
    "size": 1,
    "crc": 1,
}
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
# ffcv's alignment gap after the image as a field: else its bytes would be uninitialized memory
SAMPLE = np.dtype(
    [("image", _IMAGE), ("gap", "<u1", 3), ("label", "<i8"), ("size", "<i8"), ("crc", "<i8")]
)
PLACE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SAMPLES_START = HEADER.itemsize + len(BETON_FIELDS) * FIELD.itemsize
_LARGEST_METADATA_MIB = 64


@dataclass(frozen=True)
class Beton:
    """The content of the .json beside a .beton.

    source: fingerprint of the images it was written from. fingerprint: of its own images; equals
    `source` where all are stored without loss. max_side_px: longer sides were resized to it; 0:
    none. side_px: the same of shorter sides. jpeg_share: share of the images stored as JPEG of
    `quality`; None: JPEG files keep their bytes, all others are stored uncompressed. mean, std: the
    profile's. samples_sha256: of the metadata, which ties the two files together. content: digest
    of the source's bytes (see data/content), or of them and what was changed; empty where an older
    version wrote the file.
    """

    layout: int
    split: str
    profile: str
    num_images: int
    num_bytes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_side_px: int
    jpeg_share: float | None
    quality: int
    is_lossless: bool
    source: str
    fingerprint: str
    samples_sha256: str
    classes: tuple[str, ...]
    content: str = ""
    side_px: int = 0

    @property
    def changes(self) -> str:
        """How its pixels were made others than the source's; "" where they are the same."""
        if self.is_lossless:
            return ""
        words = [f"side={self.side_px}"] * (self.side_px > 0)
        words += [f"max_side={self.max_side_px}"] * (self.max_side_px > 0)
        if self.jpeg_share:
            words.append(f"jpeg_share={self.jpeg_share:g} quality={self.quality}")
        return " ".join(words) or "re-encoded"

    @property
    def title(self) -> str:
        """What it holds, for a row: raw pixels, or JPEG files as well; and its changes."""
        return f"{'raw' if self.jpeg_share == 0 else '.beton'} {self.changes}".strip()

    def as_json(self) -> bytes:
        """The bytes of the .json."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def beton_file(folder: Path, split: str) -> Path:
    """The path of a split's .beton in a folder; its .json lies beside it."""
    return Path(folder) / f"{split}.beton"


def has_betons(folder: Path | None) -> bool:
    """Does a folder hold train.beton and val.beton?"""
    return folder is not None and all(
        beton_file(folder, split).is_file() for split in ("train", "val")
    )


def chosen_loader(asked: str, folder: Path | None, log: Callable[[str], None] = print) -> str:
    """The loader of loader=: "auto" is ffcv where it is installed and the folder holds lossless
    .beton files, else torch.

    Resized or re-encoded images are other data than those beside them: the result of a run would
    depend on whether ffcv is installed. A line is logged where such files are not used; torch reads
    them where they are alone in their folder.

    Raises UserError where ffcv is asked for and one of the two is missing.
    """
    if asked not in ("auto", "ffcv"):
        return asked
    is_installed, is_written = importlib.util.find_spec("ffcv") is not None, has_betons(folder)
    if asked == "auto":
        changed = _changed(folder) if is_written else ""
        if changed and is_installed and holds_files(folder):
            log(f"loader=auto: using torch, since {changed}; use loader=ffcv to read it")
        return "ffcv" if is_installed and is_written and not changed else "torch"
    if not is_installed:
        way = "`make setup ffcv=1`" if program() == "make" else "`rsb doctor`, which says how"
        raise UserError(f"loader=ffcv: ffcv is not installed; run {way}, or use loader=torch")
    if not is_written:
        place = (
            f"{folder} holds no train.beton and val.beton"
            if folder
            else "needs data_dir=<folder with train.beton and val.beton>"
        )
        raise UserError(
            f"loader=ffcv: {place}; run `{command('data')}`, then use data_dir=<its out=>"
        )
    return asked


def _changed(folder: Path) -> str:
    """Which of a folder's .beton files does not hold its source's exact pixels, and how; "" for
    neither.
    """
    for path in (beton_file(folder, split) for split in ("train", "val")):
        try:
            metadata = _read_metadata(path.with_suffix(".json"))
        except (OSError, ValueError, TypeError, KeyError):
            return f"the .json of {path} cannot be read"
        if metadata.changes:
            return f"{path} holds changed images ({metadata.changes})"
    return ""


def beton_fingerprint(
    source: str,
    is_lossless: bool,
    max_side_px: int,
    jpeg_share: float | None,
    quality: int,
    side_px: int = 0,
) -> str:
    """The fingerprint of a .beton's images: pixels that differ from the source are other data."""
    if is_lossless:
        return source
    words = f"{source} {max_side_px} {jpeg_share} {quality}{f' {side_px}' if side_px else ''}"
    return hashlib.sha256(words.encode()).hexdigest()


class Mapped(Pixels):
    """An image in a memory map, [H, W, C] uint8, of which a crop reads no more than its box."""

    def square(self, box: tuple[int, int, int, int], resampling: int, train_px: int) -> np.ndarray:
        """As Pixels, resized by torch: PIL's filter up to rounding, in a third of the time."""
        return resized(self.pixels, box, resampling, train_px)


@dataclass(frozen=True)
class BetonSet:
    """A split in a .beton, read without ffcv: PIL decodes it.

    is_for_training: read() gives an uncompressed image as it lies in the memory map.
    """

    path: Path
    facts: Beton
    num_channels: int = 3
    is_for_training: bool = False
    is_in_memory = False

    def __getstate__(self):
        # without the cached memory maps: another process maps the file again
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return self.facts.num_images

    @property
    def classes(self) -> tuple[str, ...]:
        """Names; a label is a place in them."""
        return self.facts.classes

    @property
    def fingerprint(self) -> str:
        """Of the images in the file."""
        return self.facts.fingerprint

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] int64."""
        return np.ascontiguousarray(self.samples["label"])

    @cached_property
    def samples(self) -> np.ndarray:
        """The metadata, memory-mapped: [N] of SAMPLE."""
        return np.asarray(np.memmap(self.path, SAMPLE, "r", SAMPLES_START, (self.num_images,)))

    @cached_property
    def places(self) -> np.ndarray:
        """Where each image's bytes are, memory-mapped: [N] of PLACE."""
        start = int(np.fromfile(self.path, HEADER, 1)[0]["alloc_table_ptr"])
        return np.asarray(np.memmap(self.path, PLACE, "r", start, (self.num_images,)))

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))

    @cached_property
    def _is_seen(self) -> np.ndarray:
        return np.zeros(self.num_images, bool)

    def source_sides(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(heights, widths) of images as they were in the source, [B] int64 each."""
        size = self.samples["size"][images]
        return size >> 32, size & 0xFFFFFFFF

    def sides(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(heights, widths) of images as they lie here, [B] int64 each."""
        stored = self.samples["image"][images]
        return stored["height"].astype(np.int64), stored["width"].astype(np.int64)

    def content(self, i: int) -> bytes:
        """The stored bytes of image i. Raises BadImage where their CRC-32 is wrong."""
        return self._checked(i).tobytes()

    def _checked(self, i: int) -> np.ndarray:
        place = self.places[i]
        found = self._bytes[int(place["ptr"]) : int(place["ptr"]) + int(place["size"])]
        # of an image in the memory map once: later reads are of a part of it
        if not (self.is_for_training and self._is_seen[i]):
            if zlib.crc32(found) != int(self.samples["crc"][i]):
                raise BadImage(
                    f"{self.path}: image {i} is damaged (wrong CRC-32); "
                    f"run `{command('data')}` again"
                )
            self._is_seen[i] = True
        return found

    def read(self, i: int) -> Image.Image | Mapped:
        """Image i, RGB, or its luma for one channel. Raises BadImage."""
        stored = self.samples["image"][i]
        if self.is_for_training and stored["mode"] == RAW:
            pixels = self._checked(i).reshape(int(stored["height"]), int(stored["width"]), 3)
            # of one channel: three equal ones, each its luma
            return Mapped(pixels[:, :, : self.num_channels])
        image = decoded_pixels(self.content(i), self.samples["image"][i], f"{self.path}: image {i}")
        return image.convert("L") if self.num_channels == 1 else image


def decoded_pixels(content: bytes, stored: np.ndarray, where: str) -> Image.Image:
    """Stored bytes as an RGB image. Raises BadImage."""
    height, width = int(stored["height"]), int(stored["width"])
    if stored["mode"] == RAW:
        return Image.frombytes("RGB", (width, height), content)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB")
    except Exception as error:  # whatever a decoder raises for damaged bytes
        raise BadImage(
            f"{where} does not decode ({' '.join(str(error).split())}); "
            f"run `{command('data')}` again"
        ) from None
    if image.size != (width, height):
        raise BadImage(
            f"{where} is {image.size[0]} x {image.size[1]}, not {width} x {height}; "
            f"run `{command('data')}` again"
        )
    return image


def open_beton(folder: Path, split: str, channels: int | None = None) -> BetonSet:
    """Open a split's .beton, after checking that its metadata never points outside the file.

    channels: of the profile; None for the file's own.

    Raises DataError where it or its .json is missing or damaged, where the two do not belong
    together, and where it has other channels.
    """
    path = beton_file(folder, split)
    try:
        metadata = _read_metadata(path.with_suffix(".json"))
        found = BetonSet(path, metadata, channels or metadata.channels)
        _check(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: not a .beton with its .json ({reason}); run `{command('data')}` again, "
            "or use loader=torch with an image folder"
        ) from None
    if metadata.channels != found.num_channels:
        raise DataError(
            f"{path}: {metadata.channels} channels, where the profile has {channels}; "
            f"run `{command('data')}` with this profile"
        )
    return found


def _read_metadata(path: Path) -> Beton:
    read = json_file(path, _LARGEST_METADATA_MIB)
    metadata = Beton(**read | {key: tuple(read[key]) for key in ("mean", "std", "classes")})
    if metadata.layout != LAYOUT:
        raise ValueError(f"layout {metadata.layout} is not supported, only {LAYOUT}")
    return metadata


def _check(found: BetonSet) -> None:
    """Raises ValueError."""
    num_bytes = found.path.stat().st_size
    header = np.fromfile(found.path, HEADER, 1)[0]
    if (num_bytes, header["version"], header["num_samples"]) != (
        found.facts.num_bytes,
        VERSION,
        found.num_images,
    ):
        raise ValueError("size, version or number of images differ from the .json")
    samples, places = found.samples, found.places
    if samples_digest(samples) != found.facts.samples_sha256:
        raise ValueError("its images differ from the .json")
    image = samples["image"]
    first, size = image["data_ptr"], places["size"]
    is_inside = (
        (first == places["ptr"]) & (first < num_bytes) & (size <= num_bytes - first) & (size > 0)
    )
    pixels = image["height"].astype(np.uint64) * image["width"]
    if not (
        is_inside.all()
        and pixels.all()
        and (pixels[image["mode"] == RAW] * 3 == size[image["mode"] == RAW]).all()
    ):
        raise ValueError("its metadata point outside the file")
    labels = found.labels
    if labels.min() < 0 or labels.max() >= len(found.classes):
        raise ValueError("a label without a class")


def samples_digest(samples: np.ndarray) -> str:
    """sha256 (hex) of the metadata."""
    return hashlib.sha256(np.ascontiguousarray(samples).view(np.uint8)).hexdigest()
