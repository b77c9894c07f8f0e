"""Images of one split that are in another one too: the same file, or nearly the same picture.

Two pictures are nearly the same where their difference hashes, 256 comparisons of neighbours in a
17 x 16 grey thumbnail, differ in at most NEAR_BITS: another size, format or quality of one photo
moves a few of them, unrelated photos about half. Pictures with little in them are not compared.

Source of the hash: Krawetz 2013, "Kind of Like That" (dHash), here of 256 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from trainer.data.decode import Planes

NEAR_BITS = 15
_SIDE = 16
_NUM_BANDS = NEAR_BITS + 1  # of 16 bits: two hashes within NEAR_BITS are equal in one at least
_DIGEST_BYTES = 16
_FLAT_LEVELS = 4.0  # standard deviation of a thumbnail with nothing to compare
_LARGEST_BUCKET = 1000  # train images of one band: more say nothing, as of white margins
_PAIRS_AT_ONCE = 1 << 20


class Looks(NamedTuple):
    """What images are compared by. digests: [N, 16] uint8, of the files. hashes: [N, 32] uint8, of
    the pictures. is_flat: [N] bool, too little in it to be compared.
    """

    digests: np.ndarray
    hashes: np.ndarray
    is_flat: np.ndarray


def empty_looks(num_images: int) -> Looks:
    """Room for so many, none of which is equal to any other."""
    digests = np.zeros((num_images, _DIGEST_BYTES), np.uint8)
    hashes = np.zeros((num_images, _SIDE * _SIDE // 8), np.uint8)
    return Looks(digests, hashes, np.ones(num_images, bool))


def look_of(content: bytes, image: Image.Image | Planes) -> tuple[bytes, np.ndarray, bool]:
    """The digest, hash and flatness of one image: its file's bytes and its pixels."""
    grey = (image.planes[0] if isinstance(image, Planes) else image).convert("L")
    small = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)).astype(int)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
    return digest, bits, bool(small.std() < _FLAT_LEVELS)


def same_files(val: Looks, train: Looks) -> list[tuple[int, int]]:
    """(val image, train image) of every val image whose file is in train too, byte for byte."""
    digests, places = np.unique(_keys(train.digests), return_index=True)
    known = _keys(val.digests)
    found = np.searchsorted(digests, known).clip(max=len(digests) - 1)
    is_same = (digests[found] == known) & val.digests.any(axis=1)
    return [(int(i), int(places[found[i]])) for i in np.flatnonzero(is_same)]


def similar_pictures(val: Looks, train: Looks) -> list[tuple[int, int]]:
    """(val image, train image) of every val image that is nearly the same as one of train, with
    the nearest.
    """
    nearest: dict[int, tuple[int, int]] = {}
    for ours, theirs in _candidates(val, train):
        distances = np.unpackbits(val.hashes[ours] ^ train.hashes[theirs], axis=1).sum(axis=1)
        for place in np.flatnonzero(distances <= NEAR_BITS):
            i, found = int(ours[place]), (int(distances[place]), int(theirs[place]))
            nearest[i] = min(found, nearest.get(i, found))
    return [(i, place) for i, (_, place) in sorted(nearest.items())]


def _keys(digests: np.ndarray) -> np.ndarray:
    """[N, 16] uint8 as [N] that can be sorted."""
    return np.ascontiguousarray(digests).view(f"V{_DIGEST_BYTES}").reshape(-1)


def _candidates(val: Looks, train: Looks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (val images, train images) that are equal in one band of their hashes."""
    ours, theirs = (np.flatnonzero(~looks.is_flat) for looks in (val, train))
    val_bands, train_bands = (
        np.ascontiguousarray(looks.hashes[places]).view(np.uint16)
        for looks, places in ((val, ours), (train, theirs))
    )
    for band in range(_NUM_BANDS):
        order = np.argsort(train_bands[:, band], kind="stable")
        ranked = train_bands[order, band]
        first = np.searchsorted(ranked, val_bands[:, band], "left")
        counts = np.searchsorted(ranked, val_bands[:, band], "right") - first
        counts[counts > _LARGEST_BUCKET] = 0
        ends = np.cumsum(counts)
        for start in range(0, int(ends[-1]) if len(ends) else 0, _PAIRS_AT_ONCE):
            pairs = np.arange(start, min(start + _PAIRS_AT_ONCE, int(ends[-1])))
            owners = np.searchsorted(ends, pairs, "right")
            places = first[owners] + pairs - (ends - counts)[owners]
            yield ours[owners], theirs[order[places]]
