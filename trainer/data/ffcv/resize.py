"""Crop, resize and flip as Pillow does it, compiled: the same bytes as the torch loader's, without
the GIL.

Two passes of whole numbers, first along rows, then along columns, each pixel rounded to 8 bits in
between. Source: Pillow's src/libImaging/Resample.c, of which this is the 8-bit case; a test
compares the two byte by byte.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit
from PIL import Image

_BITS = 22  # of a weight, behind the point: 32 less 8 of a pixel and 2 for sums that overshoot
_HALF = 1 << (_BITS - 1)
_SUPPORT = (1.0, 2.0)  # in source pixels, of bilinear and of bicubic


@njit(nogil=True, cache=True)
def _filter(x, is_bicubic):
    """The weight at distance x: a triangle, or the cubic of a = -0.5."""
    x = abs(x)
    if not is_bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@njit(nogil=True, cache=True)
def _weights(num_in, num_out, is_bicubic):
    """Which source pixels each target pixel is made of: (first [num_out], how many [num_out],
    weights [num_out, most]).
    """
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    support = _SUPPORT[1 if is_bicubic else 0] * stretch
    firsts, counts = np.empty(num_out, np.int64), np.empty(num_out, np.int64)
    weights = np.zeros((num_out, int(np.ceil(support)) * 2 + 1), np.int32)
    drawn = np.empty(weights.shape[1], np.float64)
    for place in range(num_out):
        center = (place + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        count = min(num_in, int(center + support + 0.5)) - first
        total = 0.0
        for k in range(count):
            drawn[k] = _filter((k + first - center + 0.5) * (1.0 / stretch), is_bicubic)
            total += drawn[k]
        for k in range(count):
            share = drawn[k] / total if total != 0.0 else drawn[k]
            weights[place, k] = np.int32(share * (1 << _BITS) + (0.5 if share >= 0 else -0.5))
        firsts[place], counts[place] = first, count
    return firsts, counts, weights


@njit(nogil=True, cache=True, inline="always")
def _pixel(total):
    """A sum of weighted pixels as a pixel."""
    return np.uint8(min(255, max(0, total >> _BITS)))


@njit(nogil=True, cache=True)
def _along_rows(image, top, left, height, width, side, is_bicubic):
    """The box of an image [H, W, 3], its rows `side` long: [height, 3 * side] uint8, channel after
    channel.

    Unsigned places: numba looks at every signed one whether it counts from the end.
    """
    firsts, counts, weights = _weights(width, side, is_bicubic)
    out = np.empty((height, 3 * side), np.uint8)
    pixels, each, most = image.reshape(-1), weights.reshape(-1), weights.shape[1]
    three, one = np.uint64(3), np.uint64(1)
    for y in range(height):
        row = out[y]
        for x in range(side):
            red = green = blue = np.int32(_HALF)
            at = np.uint64(3 * ((top + y) * image.shape[1] + left + firsts[x]))
            weigh = np.uint64(x * most)
            for _ in range(counts[x]):
                weight = each[weigh]
                red += weight * np.int32(pixels[at])
                green += weight * np.int32(pixels[at + one])
                blue += weight * np.int32(pixels[at + one + one])
                at += three
                weigh += one
            row[x], row[side + x], row[2 * side + x] = _pixel(red), _pixel(green), _pixel(blue)
    return out


@njit(nogil=True, cache=True)
def _along_columns(lines, length, side, is_bicubic):
    """The first `length` of lines [height, ...] uint8, resized along columns: [side, length]."""
    firsts, counts, weights = _weights(len(lines), side, is_bicubic)
    total, out = np.empty(length, np.int32), np.empty((side, length), np.uint8)
    for y in range(side):
        total[:] = _HALF
        for k in range(counts[y]):
            weight, line = weights[y, k], lines[firsts[y] + k]
            for x in range(length):
                total[x] += weight * np.int32(line[x])
        row = out[y]
        for x in range(length):
            row[x] = _pixel(total[x])
    return out


@njit(nogil=True, cache=True)
def _as_it_lies(image, top, left, height, width):
    """The box of an image, not resized: as _along_rows gives it."""
    out = np.empty((height, 3 * width), np.uint8)
    for y in range(height):
        for channel in range(3):
            for x in range(width):
                out[y, channel * width + x] = image[top + y, left + x, channel]
    return out


@njit(nogil=True, cache=True)
def crop_and_resize(
    image, top, left, height, width, side, is_bicubic, is_down_first, is_flipped, out
):
    """Fill out[C, :side, :side] from a box of an image [H, W, 3] uint8; C = 1 takes the first
    channel.

    is_down_first: along columns first, as goes_down_first() has it.
    """
    if is_down_first:
        part = np.ascontiguousarray(image[top : top + height, left : left + width]).reshape(
            height, 3 * width
        )
        image = _along_columns(part, 3 * width, side, is_bicubic).reshape(side, width, 3)
        top, left, height = 0, 0, side
    if width == side:
        lines = _as_it_lies(image, top, left, height, width)
    else:
        lines = _along_rows(image, top, left, height, width, side, is_bicubic)
    if height != side:
        lines = _along_columns(lines, out.shape[0] * side, side, is_bicubic)
    for channel in range(out.shape[0]):
        for y in range(side):
            part, to = lines[y, channel * side : (channel + 1) * side], out[channel, y]
            for x in range(side):
                to[x] = part[side - 1 - x] if is_flipped else part[x]


def goes_down_first(heights: np.ndarray, widths: np.ndarray, side: int) -> np.ndarray:
    """Does this Pillow resize boxes of these sides to a square along columns first? [B] bool.

    From Pillow 13 on it does where the height loses more than twice what the width does; found by
    trying, and tested.
    """
    return pillow_may_go_down_first() & (heights > side) & (heights - side > 2 * (widths - side))


@lru_cache(maxsize=1)
def pillow_may_go_down_first() -> bool:
    """Is the Pillow here one of those that do?"""
    tall = Image.fromarray(
        (np.arange(40 * 9, dtype=np.int64) ** 2 % 251).astype(np.uint8).reshape(40, 9)
    )
    across_first = tall.resize((8, 40), Image.Resampling.BICUBIC).resize(
        (8, 8), Image.Resampling.BICUBIC
    )
    return tall.resize((8, 8), Image.Resampling.BICUBIC).tobytes() != across_first.tobytes()
