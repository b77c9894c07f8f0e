"""Which part of each image is seen: random crops and flips for training, one central crop for
evaluation.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field

from trainer.base.component import Positive
from trainer.base.errors import UserError
from trainer.base.streams import uniforms
from trainer.components.augmentation import Crop, Mirror
from trainer.components.boxes import (
    NUM_ATTEMPTS,
    AreaRange,
    AspectRange,
    ascending,
    drawn_sides,
    drawn_start,
    first_fitting,
)

CropMode = Literal["center", "squash", "border"]
CropInterpolation = Literal["bilinear", "bicubic", "random", "bilinear_no_antialias"]
_NUM_INCEPTION_ATTEMPTS = 100


class RandomResizedCrop(Crop):
    """A box of random area and aspect, later resized to the training size.

    area: bounds of the box's share of the image.
    aspect: bounds of its width / height.
    interpolation: the filter of the resize; "random" draws bilinear or bicubic for each image,
    "bilinear_no_antialias" reads the four nearest pixels however much smaller the box becomes
    (OpenCV, TensorFlow, DALI), where the others smooth (PIL).

    Ten boxes are tried; where none fits, the largest central box within the bounds of the aspect is
    taken.

    Source: Szegedy et al. 2014, arXiv:1409.4842; the rule is torchvision's and timm's, in
    distribution.
    """

    name: Literal["random_resized_crop"] = "random_resized_crop"
    area: AreaRange
    aspect: AspectRange
    interpolation: CropInterpolation
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

    @property
    def antialias(self) -> bool:
        return self.interpolation != "bilinear_no_antialias"

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
        return draws < {"bicubic": 1.0, "random": 0.5}.get(self.interpolation, 0.0)


class InceptionCrop(Crop):
    """A box whose aspect is uniform, and then its height between the least and the largest that the
    bounds leave, later resized to the training size: small boxes are more frequent than by
    random_resized_crop, whose area is uniform.

    area: bounds of the box's share of the image.
    aspect: bounds of its width / height.
    interpolation: as random_resized_crop's, without "random".

    A hundred boxes are tried; where none fits, the whole image is taken.

    Source: TensorFlow's sample_distorted_bounding_box, as big_vision calls it.
    """

    name: Literal["inception_crop"] = "inception_crop"
    area: AreaRange
    aspect: AspectRange
    interpolation: Literal["bilinear", "bicubic", "bilinear_no_antialias"]
    purpose: ClassVar[str] = "inception_crop"
    example: ClassVar[dict[str, Any]] = {
        "area": (0.05, 1.0),
        "aspect": (0.75, 1.33),
        "interpolation": "bilinear_no_antialias",
    }

    @property
    def antialias(self) -> bool:
        return self.interpolation != "bilinear_no_antialias"

    def with_least_area(self, share: float) -> Self:
        return self.model_copy(update={"area": (share, 1.0)})

    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        heights, widths = (np.asarray(side, dtype=np.int64) for side in (heights, widths))
        draws = uniforms(seed, self.purpose, ids, 2 * _NUM_INCEPTION_ATTEMPTS + 2)
        tilt, growth = draws[:, :-2].reshape(len(ids), -1, 2).transpose(2, 0, 1)
        aspect = self.aspect[0] + (self.aspect[1] - self.aspect[0]) * tilt
        tried_h, tried_w, fits = self._tried(aspect, growth, heights[:, None], widths[:, None])
        found, height, width = first_fitting(fits, tried_h, tried_w)
        height, width = np.where(found, height, heights), np.where(found, width, widths)
        # The source draws below the room, not up to it: a box never touches the far edge by chance.
        top, left = (
            drawn_start(draws[:, place], np.maximum(room - 1, 0))
            for place, room in ((-2, heights - height), (-1, widths - width))
        )
        return np.stack([top, left, height, width], axis=1), np.full(
            len(ids), self.interpolation == "bicubic"
        )

    def _tried(
        self, aspect: np.ndarray, growth: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Heights and widths in px of every attempt, and whether it fits: [B, attempts] each."""
        least, most = (share * heights * widths for share in self.area)
        lowest, highest = (np.rint(np.sqrt(area / aspect)) for area in (least, most))
        by_width = np.floor((widths + 0.5 - 1e-7) / aspect)
        by_width -= np.rint(by_width * aspect) > widths
        highest = np.where(np.rint(highest * aspect) > widths, by_width, highest)
        highest = np.minimum(highest, heights)
        lowest = np.minimum(lowest, highest)
        height = lowest + np.floor(growth * (highest - lowest + 1))
        # Rounding may leave an area just outside its bounds: one row more, or one less, is tried.
        height += np.rint(height * aspect) * height < least
        height -= np.rint(height * aspect) * height > most
        width = np.rint(height * aspect)
        area = height * width
        fits = (area >= least) & (area <= most) & (height <= heights) & (width <= widths)
        return height.astype(np.int64), width.astype(np.int64), fits & (area > 0)


class Resize(Crop):
    """No box of a random size: the image itself, or its largest square, resized to the training
    size.

    part: "whole" squashes an image that is not square; "center" keeps its central square
    (torchvision's Resize and CenterCrop, timm's --no-aug), "random" one at a drawn place (Resize
    and RandomCrop).
    interpolation: as random_resized_crop's, without "random".

    The square is cut at a whole pixel of the image before the resize, the sources cut after it: up
    to half a pixel apart.
    """

    name: Literal["resize"] = "resize"
    part: Literal["whole", "center", "random"]
    interpolation: Literal["bilinear", "bicubic", "bilinear_no_antialias"]
    purpose: ClassVar[str] = "resize"
    example: ClassVar[dict[str, Any]] = {"part": "center", "interpolation": "bicubic"}

    @property
    def antialias(self) -> bool:
        return self.interpolation != "bilinear_no_antialias"

    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        sides = np.stack([heights, widths], axis=1).astype(np.int64)
        kept = (
            sides if self.part == "whole" else np.broadcast_to(sides.min(1)[:, None], sides.shape)
        )
        room = sides - kept
        if self.part == "random":
            start = drawn_start(uniforms(seed, self.purpose, ids, 1), room)
        else:
            start = room // 2
        is_bicubic = np.full(len(ids), self.interpolation == "bicubic")
        return np.concatenate([start, kept], axis=1), is_bicubic


class ScaleCrop(Crop):
    """A square of the image at a drawn place, of a drawn size: as if the image were resized by a
    random factor, and a square of the training size cut out.

    scale: bounds of the factor, drawn evenly. share: at factor 1 the square's side, as a share of
    the image's shorter side (480 / 520 where shorter sides of 520 px are cropped to 480).
    interpolation: as random_resized_crop's, without "random".

    A square that is larger than the image starts at its upper or left edge; what is outside is
    black, and no target is there. Only tasks whose targets have places take such.

    Source: torchvision's references/segmentation (RandomResize, RandomCrop), which rounds the
    resized image where here it is the square; DeepLab's factors are 0.5 to 2.
    """

    name: Literal["scale_crop"] = "scale_crop"
    scale: Annotated[tuple[Positive, Positive], AfterValidator(ascending)]
    share: Annotated[float, Field(gt=0, le=4)]
    interpolation: Literal["bilinear", "bicubic", "bilinear_no_antialias"]
    purpose: ClassVar[str] = "scale_crop"
    example: ClassVar[dict[str, Any]] = {
        "scale": (1.0, 2.0),
        "share": 0.875,
        "interpolation": "bilinear",
    }

    @property
    def antialias(self) -> bool:
        return self.interpolation != "bilinear_no_antialias"

    def check(self, plan) -> None:
        super().check(plan)
        if self.share > self.scale[0] and not plan.recipe.of_task.takes_padding:
            raise UserError(
                f"augment.{self.name}: at scale {self.scale[0]:g} it reaches out of the image,"
                f" which {plan.recipe.of_task.name} does not take",
                f"use a scale from {self.share:g} on",
            )

    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        draws = uniforms(seed, self.purpose, ids, 3)
        sides = np.stack([heights, widths], axis=1).astype(np.int64)
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, 0]
        side = np.maximum(1, np.rint(sides.min(1) * self.share / factor)).astype(np.int64)
        start = drawn_start(draws[:, 1:], np.maximum(sides - side[:, None], 0))
        is_bicubic = np.full(len(ids), self.interpolation == "bicubic")
        return np.stack([*start.T, side, side], axis=1), is_bicubic


class Flip(Mirror):
    """Left and right change places in half of the images.

    share: in another share of them than a half.
    alternating: it is drawn for epoch 0; from then on each image is flipped in every other epoch,
    so that two epochs in a row show both sides of all.

    Source: Jordan 2024, arXiv:2404.00498 (alternating).
    """

    name: Literal["flip"] = "flip"
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    alternating: bool = False
    purpose: ClassVar[str] = "flip"

    def draw(self, seed: int, ids: np.ndarray) -> np.ndarray:
        share = 0.5 if self.share is None else self.share
        if not self.alternating:
            return uniforms(seed, self.purpose, ids, 1)[:, 0] < share
        epochs, ids = np.asarray(ids)[:, 0], np.array(ids)
        ids[:, 0] = 0
        return (uniforms(seed, self.purpose, ids, 1)[:, 0] < share) ^ (epochs % 2 == 1)


def evaluation_size(test_px: int, crop_share: float) -> int:
    """The shorter side in px that an image is resized to before its central test_px are kept.

    Source: timm floors (224 / 0.95 gives 235); others round, which is another evaluation.
    """
    return math.floor(test_px / crop_share)


def evaluation_geometry(
    height: int, width: int, test_px: int, crop_share: float, mode: CropMode = "center"
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How one image is evaluated: the (height, width) it is resized to, then the box (top, left,
    height, width) kept.

    mode: "center" resizes the shorter side, "squash" both sides alike, "border" the longer side,
    so that the box may reach beyond the image.

    All in px. The longer side is truncated and the margins are rounded half to even.
    Source: timm's evaluation transforms of these crop modes; "center" is torchvision's Resize of
    the shorter side and CenterCrop.
    """
    side_px = evaluation_size(test_px, crop_share)
    if mode == "squash":
        resized = (side_px, side_px)
    elif mode == "border":
        ratio = max(height, width) / side_px
        resized = (max(1, round(height / ratio)), max(1, round(width / ratio)))
    else:
        shorter = min(height, width)
        resized = (int(side_px * height / shorter), int(side_px * width / shorter))
    top, left = (
        round((side - test_px) / 2) if side >= test_px else -((test_px - side) // 2)
        for side in resized
    )
    return resized, (top, left, test_px, test_px)
