"""Which part of each image is seen: random crops and flips for training, one central crop for
evaluation.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import numpy as np

from trainer.base.streams import uniforms
from trainer.components.augmentation import Crop, Mirror
from trainer.components.boxes import (
    NUM_ATTEMPTS,
    AreaRange,
    AspectRange,
    drawn_sides,
    drawn_start,
    first_fitting,
)


class RandomResizedCrop(Crop):
    """A box of random area and aspect, later resized to the training size.

    area: bounds of the box's share of the image.
    aspect: bounds of its width / height.
    interpolation: the filter of the resize; "random" draws bilinear or bicubic for each image.

    Ten boxes are tried; where none fits, the largest central box within the bounds of the aspect is
    taken.

    Source: Szegedy et al. 2014, arXiv:1409.4842; the rule is torchvision's and timm's, in
    distribution.
    """

    name: Literal["random_resized_crop"] = "random_resized_crop"
    area: AreaRange
    aspect: AspectRange
    interpolation: Literal["bilinear", "bicubic", "random"]
    purpose: ClassVar[str] = "crop"
    example: ClassVar[dict[str, Any]] = {
        "area": (0.08, 1.0),
        "aspect": (0.75, 1.3333),
        "interpolation": "random",
    }

    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        heights, widths = (np.asarray(side, dtype=np.int64) for side in (heights, widths))
        draws = uniforms(seed, self.purpose, ids, 2 * NUM_ATTEMPTS + 3)
        tried_w, tried_h = drawn_sides(draws[:, :-3], heights * widths, self.area, self.aspect)
        fits = (
            (tried_w >= 1)
            & (tried_w <= widths[:, None])
            & (tried_h >= 1)
            & (tried_h <= heights[:, None])
        )
        found, width, height = first_fitting(fits, tried_w, tried_h)
        central_h, central_w = self._central_sides(heights, widths)
        height, width = np.where(found, height, central_h), np.where(found, width, central_w)
        top = np.where(found, drawn_start(draws[:, -3], heights - height), (heights - height) // 2)
        left = np.where(found, drawn_start(draws[:, -2], widths - width), (widths - width) // 2)
        return np.stack([top, left, height, width], axis=1), self._is_bicubic(draws[:, -1])

    def with_least_area(self, share: float) -> Self:
        return self.model_copy(update={"area": (share, 1.0)})

    def _central_sides(
        self, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The whole image, or all of its shorter side where the image itself is outside the bounds
        of the aspect.
        """
        narrowest, widest = self.aspect
        ratio = widths / heights
        height = np.where(ratio < narrowest, np.rint(widths / narrowest), heights)
        width = np.where(ratio > widest, np.rint(heights * widest), widths)
        return height.astype(np.int64), width.astype(np.int64)

    def _is_bicubic(self, draws: np.ndarray) -> np.ndarray:
        return draws < {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}[self.interpolation]


class Flip(Mirror):
    """Left and right change places in half of the images."""

    name: Literal["flip"] = "flip"
    purpose: ClassVar[str] = "flip"

    def draw(self, seed: int, ids: np.ndarray) -> np.ndarray:
        return uniforms(seed, self.purpose, ids, 1)[:, 0] < 0.5


def evaluation_size(test_px: int, crop_share: float) -> int:
    """The shorter side in px that an image is resized to before its central test_px are kept.

    Source: timm floors (224 / 0.95 gives 235); others round, which is another evaluation.
    """
    return math.floor(test_px / crop_share)


def evaluation_geometry(
    height: int, width: int, test_px: int, crop_share: float
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How one image is evaluated: the (height, width) it is resized to, then the box (top, left,
    height, width) kept.

    All in px. The longer side is truncated and the margins are rounded half to even.
    Source: timm's evaluation transform, which is torchvision's Resize of the shorter side and
    CenterCrop.
    """
    short_px = evaluation_size(test_px, crop_share)
    shorter = min(height, width)
    resized = (int(short_px * height / shorter), int(short_px * width / shorter))
    top, left = (round((side - test_px) / 2) for side in resized)
    return resized, (top, left, test_px, test_px)
