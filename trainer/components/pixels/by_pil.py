"""On a CPU: movements of large images by PIL itself, which tensor operations equal within a grey
level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from trainer.components.pixels.geometry import INTERPOLATIONS

_FILTERS = [Image.Resampling[name.upper()] for name in INTERPOLATIONS]
_RGB = 3


def affine_by_pil(
    images: Tensor, matrices: np.ndarray, filters: np.ndarray, fill: tuple[int, ...]
) -> Tensor:
    """geometry.affine along both axes by Image.transform: [N, C, H, W] uint8 on a CPU to the
    same.
    """
    moved = np.empty(images.shape, np.uint8)
    for image, result, matrix, place in zip(
        images.numpy(), moved, matrices.tolist(), filters.tolist(), strict=True
    ):
        at_once = _RGB if len(image) == _RGB else 1
        for first in range(0, len(image), at_once):
            bands = slice(first, first + at_once)
            whole = _image(image[bands])
            there = whole.transform(
                whole.size,
                Image.Transform.AFFINE,
                matrix,
                _FILTERS[place],
                fillcolor=fill[bands] if at_once > 1 else fill[first],
            )
            for band, plane in zip(result[bands], there.split(), strict=True):
                band[...] = np.asarray(plane)
    return torch.from_numpy(moved)


def filtered_by_pil(images: Tensor, filters: Sequence[ImageFilter.Filter]) -> Tensor:
    """Each image after its filter: [N, C, H, W] uint8 on a CPU to the same."""
    done = np.empty(images.shape, np.uint8)
    for image, result, each in zip(images.numpy(), done, filters, strict=True):
        for plane, changed in zip(image, result, strict=True):
            changed[...] = np.asarray(_image(plane[None]).filter(each))
    return torch.from_numpy(done)


def _image(bands: np.ndarray) -> Image.Image:
    """Three bands [3, H, W] uint8 as an RGB image, one as a grey one."""
    planes = [Image.frombuffer("L", band.shape[::-1], band, "raw", "L", 0, 1) for band in bands]
    return Image.merge("RGB", planes) if len(planes) > 1 else planes[0]
