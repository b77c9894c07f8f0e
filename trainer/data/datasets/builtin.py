"""Opening a dataset: bundled, downloaded, or an image folder, behind one interface."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torchvision
from PIL import Image

from trainer.base import streams
from trainer.base.cache import cache_folder
from trainer.base.commands import command
from trainer.base.errors import DataError, UserError
from trainer.data.datasets.beton import BetonSet, open_beton
from trainer.data.datasets.members import read_for_training, read_image
from trainer.data.datasets.packed import holds_files, open_files
from trainer.data.decode import Pixels, Planes
from trainer.data.index import Index
from trainer.recipe.profiles import KNOWN_SETS, PROFILES, Profile

DIGITS_VAL_PER_CLASS = 36
_DEBIAN = Path("/usr/share/datasets")
_GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_IDX_SETS = {  # torchvision's class (and folder), names of the classes
    "mnist": ("MNIST", tuple("0123456789")),
    "fashion-mnist": ("FashionMNIST", _GARMENTS),
}
_IDX_PREFIX = {"train": "train", "val": "t10k"}
# uncompressed; five times the largest file there is, against decompression bombs
_LARGEST_IDX_MIB = 256
_CIFAR_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


class ImageSet(Protocol):
    """One split of a dataset.

    labels: [N] integers, indices into classes. fingerprint: sha256 (hex) of the content.
    num_channels: of the model's input; a grey image fills all of three. is_in_memory: reading an
    image costs next to nothing.
    """

    @property
    def num_images(self) -> int: ...

    @property
    def num_channels(self) -> int: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def is_in_memory(self) -> bool: ...

    def read(self, i: int) -> Image.Image | Planes:
        """Image i, in num_channels; or grey ("L") for three in a set that is grey throughout.
        Raises BadImage.
        """


@dataclass(frozen=True)
class ArraySet:
    """A set held in memory. images: [N, H, W] grey or [N, H, W, 3] uint8. labels: [N] int64.

    is_for_training: read() returns the array itself, where its channels are the set's.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    num_channels: int = 3
    is_for_training: bool = False
    is_in_memory = True

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over shape, pixels and labels, and the channels where they are not three."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(self.labels.astype("<i8"))
        return _fingerprint_of(digest.hexdigest(), self.num_channels)

    def read(self, i: int) -> Image.Image | Pixels:
        """Image i, RGB or grey; for one channel always grey."""
        pixels = self.images[i]
        if self.is_for_training and (pixels.ndim == 2 or self.num_channels == 3):
            return Pixels(pixels)
        height, width = pixels.shape[:2]
        image = Image.frombytes(
            "L" if pixels.ndim == 2 else "RGB", (width, height), pixels.tobytes()
        )
        return image.convert("L") if self.num_channels == 1 else image


@dataclass(frozen=True)
class FolderSet:
    """A split of an image folder, or of files that hold many images; decoded on reading.

    reader: of one file and a number of channels: read_image, or one that decodes lazily.
    """

    index: Index
    num_channels: int = 3
    reader: Callable[[Path, int], Image.Image | Planes] = read_image
    is_in_memory = False

    @property
    def num_images(self) -> int:
        """Files of the split."""
        return self.index.num_images

    @property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        return self.index.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders."""
        return self.index.classes

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the files' relative paths, labels and sizes, and the channels where
        they are not three.
        """
        return _fingerprint_of(self.index.fingerprint, self.num_channels)

    def read(self, i: int) -> Image.Image | Planes:
        """Image i, in num_channels. Raises BadImage."""
        return self.reader(self.index.path(i), self.num_channels)


Opener = Callable[[str, Path | None, str], ImageSet]
_OPENERS: dict[str, Opener] = {}


def known_set(*profiles: Profile | str) -> Callable[[Opener], Opener]:
    """Register a function (name, data_dir, split) -> ImageSet that opens the datasets of these
    profiles: `data=<name>`.

    The set is a dataclass with a field num_channels, as ArraySet and FolderSet are; its content
    must not depend on time or machine. data_dir: as given by the user. split: "train" or "val".

    Raises UserError for a name that is known already.
    """

    def register(opener: Opener) -> Opener:
        for profile in profiles:
            if isinstance(profile, Profile):
                there = _OPENERS.get(profile.name)
                if profile.name in PROFILES and (
                    there is None or there.__module__ != opener.__module__
                ):
                    raise UserError(
                        f"{opener.__module__}.{opener.__qualname__}: the dataset {profile.name} is "
                        "registered already; use another name"
                    )
                PROFILES[profile.name] = profile
                KNOWN_SETS.add(profile.name)
            _OPENERS[profile if isinstance(profile, str) else profile.name] = opener
        return opener

    return register


def for_training(images: ImageSet) -> ImageSet:
    """The same set, decoding (or copying) of each image only what its crop needs."""
    if isinstance(images, ArraySet | BetonSet):
        return replace(images, is_for_training=True)
    return replace(images, reader=read_for_training) if isinstance(images, FolderSet) else images


def with_full_decoding(images: ImageSet) -> ImageSet:
    """The same set, decoding whole files when read, by PIL."""
    return replace(images, reader=read_image) if isinstance(images, FolderSet) else images


def _fingerprint_of(files: str, num_channels: int) -> str:
    """The fingerprint of files read in num_channels: the same files in one are other data."""
    return (
        files
        if num_channels == 3
        else hashlib.sha256(f"{files} {num_channels}".encode()).hexdigest()
    )


def open_set(profile: Profile, data_dir: Path | None, split: str) -> ImageSet:
    """Open one split, "train" or "val". A data_dir with train/<class>/, or with packed images (see
    packed), is used whatever the profile.

    Raises DataError where nothing is found, and where it does not match the profile.
    """
    images = replace(
        _find_set(profile.images_of or profile.name, data_dir, split), num_channels=profile.channels
    )
    _check_channels(images, profile)
    return _of_profile(images, profile, data_dir, split)


def open_beton_set(profile: Profile, folder: Path, split: str) -> BetonSet:
    """Open one split from a folder's .beton.

    Raises DataError where it is damaged, does not match the profile, or was written from other
    images than those in the folder beside it.
    """
    images = open_beton(folder, split, profile.channels)
    if holds_files(folder):
        beside = FolderSet(open_files(folder, split), profile.channels).fingerprint
        if beside != images.facts.source:
            raise DataError(
                f"{images.path}: written from other images than those now beside it; "
                f"run `{command('data')}` again, or use loader=torch"
            )
    return _of_profile(images, profile, folder, split)


def _of_profile(images: ImageSet, profile: Profile, data_dir: Path | None, split: str) -> ImageSet:
    """The same set. Raises DataError where its counts are not the profile's."""
    expected = profile.num_train if split == "train" else profile.num_val
    found = (images.num_images, len(images.classes))
    if found != (expected, profile.num_classes):
        remedy = (
            f"data={data_dir} for a profile with the folder's own counts"
            if data_dir
            else "a profile with these counts"
        )
        raise DataError(
            f"{data_dir or profile.name}: {found[0]} {split} images of {found[1]} "
            f"classes, where the profile {profile.name} has {expected} of {profile.num_classes}; "
            f"use {remedy}"
        )
    return images


def _check_channels(images: ImageSet, profile: Profile) -> None:
    if isinstance(images, ArraySet) and profile.channels not in (1, 3):
        raise DataError(
            f"{profile.name}: channels: {profile.channels}, where "
            f"{profile.images_of or profile.name} can be read in 1 or in 3; use one of them"
        )


def _find_set(name: str, data_dir: Path | None, split: str) -> ImageSet:
    if data_dir is not None and holds_files(data_dir):
        return FolderSet(open_files(data_dir, split))
    if name in _OPENERS:
        return _OPENERS[name](name, data_dir, split)
    if data_dir is None:
        raise DataError(
            f"{name}: a data profile does not say where its images are, and no data_dir= does",
            "add data_dir=<folder with train/<class>/… and val/<class>/…>",
        )
    return FolderSet(open_files(data_dir, split))  # raises: names what the folder lacks


@known_set("digits")
def _digits(name: str, data_dir: Path | None, split: str) -> ArraySet:
    """scikit-learn's 1,797 scanned digits of 8 x 8: 36 per class sampled for val, the others are
    train.
    """
    from sklearn.datasets import load_digits  # 1.6 s to import, for this data set alone

    bunch = load_digits()
    is_val = np.zeros(len(bunch.target), dtype=bool)
    for digit in range(10):
        of_class = np.flatnonzero(bunch.target == digit)
        drawn = streams.permutation(0, "split", digit, len(of_class))
        is_val[of_class[drawn[:DIGITS_VAL_PER_CLASS]]] = True
    chosen = is_val if split == "val" else ~is_val
    images = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySet(images, bunch.target[chosen].astype(np.int64), tuple("0123456789"))


@known_set(*_IDX_SETS)
def _idx_set(name: str, data_dir: Path | None, split: str) -> ArraySet:
    folder_name, classes = _IDX_SETS[name]
    root = data_dir or cache_folder() / "data"
    places = (root, root / folder_name / "raw", _DEBIAN / name)
    prefix = _IDX_PREFIX[split]
    if not any(_idx_file(place, f"{prefix}-images-idx3-ubyte") for place in places):
        _download(
            name, folder_name, root, f"the four idx files (train-images-idx3-ubyte.gz, …) in {root}"
        )
    for place in places:
        images, labels = (
            _idx_file(place, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        )
        if images and labels:
            return _checked_idx(images.parent, _read_idx(images), _read_idx(labels), classes)
    raise DataError(f"{root}: has images of {name} but not their labels; add all four idx files")


def _checked_idx(
    folder: Path, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> ArraySet:
    """Images with their labels. Raises DataError where the two do not fit together."""
    fits = images.ndim == 3 and images.size > 0 and labels.shape == images.shape[:1]
    if not fits or labels.max(initial=0) >= len(classes):
        raise DataError(
            f"{folder}: images {list(images.shape)}, labels {list(labels.shape)} up to "
            f"{labels.max(initial=0)}, where [N, H, W] and [N] below {len(classes)} are expected; "
            "download the files again"
        )
    return ArraySet(images, labels.astype(np.int64), classes)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: two zeros, type 8, the number of dimensions, each dimension as a
    big-endian 32-bit number, values.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(_LARGEST_IDX_MIB * 2**20 + 1)
        if len(content) > _LARGEST_IDX_MIB * 2**20:
            raise ValueError(f"more than {_LARGEST_IDX_MIB} MiB")
        num_dimensions = content[3]
        shape = np.frombuffer(content, ">i4", num_dimensions, offset=4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); download the file again") from None


@known_set(*_CIFAR_SETS)
def _cifar(name: str, data_dir: Path | None, split: str) -> ArraySet:
    """CIFAR's files are pickles, which can run any code: torchvision opens them only if they have
    the published MD5.
    """
    root = data_dir or cache_folder() / "data"
    kind = getattr(torchvision.datasets, _CIFAR_SETS[name])
    try:
        found = kind(root, train=split == "train")
    except RuntimeError:  # torchvision's for missing or damaged files
        _download(name, _CIFAR_SETS[name], root, f"{kind.filename} in {root}, or an image folder")
        found = kind(root, train=split == "train")
    return ArraySet(found.data, np.array(found.targets), tuple(found.classes))


def _download(name: str, class_name: str, root: Path, remedy: str) -> None:
    try:
        _download_files(class_name, root)
    except Exception as error:  # whatever a network, a proxy or a disk raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data={name}: not in {root}, and the download failed ({reason}); use {remedy}"
        ) from None


def _download_files(class_name: str, root: Path) -> None:
    getattr(torchvision.datasets, class_name)(root, download=True)
