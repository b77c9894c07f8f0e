"""Whole images in a square, their proportions kept; larger and smaller ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field

from trainer.base.errors import UserError
from trainer.base.streams import uniforms
from trainer.components.augmentation import Crop
from trainer.components.boxes import ascending, drawn_start

Size = Annotated[float, Field(ge=0.05, le=20)]


class Letterbox(Crop):
    """An image keeps its proportions in the training square: its longer side fills it, and what is
    left at the right or below is padding.

    scale: bounds of the image's size in that square, drawn evenly; above 1 a drawn part of it is
    seen, below 1 it leaves more padding. Absent: always 1.
    interpolation: as of `resize`.

    The square is of whole pixels of the image. For tasks that know of places outside an image.

    Source: the usual letterbox of detectors; with scale, the large-scale jitter of Ghiasi et al.
    2020, arXiv:2012.07177 (0.1 to 2.0).
    """

    name: Literal["letterbox"] = "letterbox"
    scale: Annotated[tuple[Size, Size], AfterValidator(ascending)] | None = None
    interpolation: Literal["bilinear", "bicubic", "bilinear_no_antialias"]
    purpose: ClassVar[str] = "letterbox"
    example: ClassVar[dict[str, Any]] = {"scale": (0.1, 2.0), "interpolation": "bilinear"}

    @property
    def antialias(self) -> bool:
        return self.interpolation != "bilinear_no_antialias"

    def check(self, plan) -> None:
        super().check(plan)
        if not plan.recipe.of_task.takes_padding:
            raise UserError(
                f"augment.{self.name}: it reaches out of the image, which task"
                f" {plan.recipe.of_task.name} does not take",
                "use resize",
            )

    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        sides = np.stack([heights, widths], axis=1).astype(np.int64)
        side, start = sides.max(axis=1), np.zeros_like(sides)
        if self.scale is not None:
            draws = uniforms(seed, self.purpose, ids, 3)
            least, most = self.scale
            scale = least + (most - least) * draws[:, 0]
            side = np.maximum(1, np.rint(side / scale)).astype(np.int64)
            room = np.maximum(sides - side[:, None], 0)
            start = drawn_start(draws[:, 1:], room)
        boxes = np.concatenate([start, side[:, None], side[:, None]], axis=1)
        return boxes, np.full(len(ids), self.interpolation == "bicubic")


def whole_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The square (top, left, height, width) in px that an image without a scale has."""
    side = max(height, width)
    return 0, 0, side, side
