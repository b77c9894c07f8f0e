"""The affine matrices of the operations that move pixels, as PIL's Image.transform and Image.rotate
take them.

Each function takes its argument as [N] float64 and the images' size in px, and gives [N, 6]
float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def shear_x(factor: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each row is read `factor` px further right than the row above."""
    return _matrices(len(factor), b=factor)


def shear_y(factor: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each column is read `factor` px further down than the column to its left."""
    return _matrices(len(factor), d=factor)


def centered_shear_x(radians: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle row stays, and each row is read tan(radians) px further right than the row
    above.
    """
    factor = np.tan(radians)
    return _matrices(len(factor), b=factor, c=-factor * (height / 2))


def centered_shear_y(radians: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle column stays, and each column is read tan(radians) px further down than the column
    to its left.
    """
    factor = np.tan(radians)
    return _matrices(len(factor), d=factor, f=-factor * (width / 2))


def translate_x(shift_px: np.ndarray, height: int, width: int) -> np.ndarray:
    """All is read shift_px further right: the picture moves left."""
    return _matrices(len(shift_px), c=shift_px)


def translate_y(shift_px: np.ndarray, height: int, width: int) -> np.ndarray:
    """All is read shift_px further down: the picture moves up."""
    return _matrices(len(shift_px), f=shift_px)


def rotate(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture turns counter-clockwise about its middle."""
    angle = -np.radians(degrees % 360.0)
    # PIL rounds here, so that a quarter turn hits the pixel centres.
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2, height / 2
    return _matrices(
        len(degrees),
        a=cos,
        b=sin,
        c=cos * -x + sin * -y + x,
        d=-sin,
        e=cos,
        f=-sin * -x + cos * -y + y,
    )


def _matrices(num_images: int, **entries: np.ndarray) -> np.ndarray:
    """Matrices that leave every pixel where it is, except for the named entries."""
    matrices = np.zeros((num_images, 6))
    for place, letter in enumerate("abcdef"):
        matrices[:, place] = entries.get(letter, 1.0 if letter in "ae" else 0.0)
    return matrices


# Each operation's matrices, and the axes along which it moves pixels.
MATRICES: dict[str, tuple[Callable[[np.ndarray, int, int], np.ndarray], str]] = {
    "shear_x": (shear_x, "x"),
    "shear_y": (shear_y, "y"),
    "centered_shear_x": (centered_shear_x, "x"),
    "centered_shear_y": (centered_shear_y, "y"),
    "translate_x": (translate_x, "x"),
    "translate_y": (translate_y, "y"),
    "rotate": (rotate, "xy"),
}
