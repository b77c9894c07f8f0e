"""Scores of an image from windows of one size, slid over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from trainer.base.component import StrictModel

Px = Annotated[int, Field(ge=1, le=8192)]


class Windows(StrictModel):
    """Squares of px at every stride_px, the last ones of a row and of a column at its end.

    Raises ValueError for strides that leave pixels out.
    """

    px: Px
    stride_px: Px

    @model_validator(mode="after")
    def _overlap(self) -> Self:
        if self.stride_px > self.px:
            raise ValueError(
                f"stride_px {self.stride_px} leaves pixels between windows of {self.px} px:"
                f" write {self.px} at most"
            )
        return self

    def starts(self, side: int) -> list[int]:
        """Of the windows along a side of so many px."""
        last = max(0, side - self.px)
        return [*range(0, last, self.stride_px), last]


def slid(score: Callable[[Tensor], Tensor], images: Tensor, windows: Windows) -> Tensor:
    """Scores [B, K, h, w] of normalized images [B, C, h, w]: of each pixel the mean of the scores
    [B, K, px, px] of all windows that it is in.

    An image that is smaller than a window has a border of zeros, the mean colour, evenly around it.

    Source: the sliding evaluation of the PSPNet authors' hszhao/semseg (tool/test.py), which
    averages probabilities.
    """
    px, sides = windows.px, images.shape[-2:]
    missing = [max(0, px - side) for side in sides]
    top, left = (number // 2 for number in missing)
    padded = functional.pad(images, (left, missing[1] - left, top, missing[0] - top))
    rows, columns = (windows.starts(side) for side in padded.shape[-2:])
    sums, counts = None, padded.new_zeros(padded.shape[-2:], dtype=torch.float32)
    for row in rows:
        for column in columns:
            place = (..., slice(row, row + px), slice(column, column + px))
            scores = score(padded[place])
            if sums is None:
                sums = scores.new_zeros(*scores.shape[:2], *padded.shape[-2:])
            sums[place] += scores
            counts[place] += 1
    assert sums is not None, "a side has at least one window"
    return (sums / counts)[..., top : top + sides[0], left : left + sides[1]]
