"""The plain sections of a page: how many images, how large, and what was scored with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.ingredients.base import Page

# The bounds only catch slips of the keyboard: no published run is near them.
NumImages = Annotated[int, Field(ge=1, le=1 << 20)]
Side = Annotated[int, Field(ge=8, le=2048)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Batch(Page):
    """How many images there are per optimizer step, and per sample of the normalization statistics.

    images: per step, over all ranks and micro-batches. norm_images: per micro-batch, which BatchNorm sees; science
    under BatchNorm, only memory under LayerNorm. drop_last: an epoch's last, smaller step is left out.
    """

    images: NumImages
    norm_images: NumImages
    drop_last: bool = False


class Image(Page):
    """Sides in px. Testing resizes the shorter side to floor(test_px / test_crop_share) and crops the centre."""

    train_px: Side
    test_px: Side
    test_crop_share: Annotated[float, Field(gt=0, le=1)]
    test_interpolation: Literal["bilinear", "bicubic"]


class Score(Page):
    """One published top-1 on ImageNet-1k val, in per cent; sides in px where its source states them."""

    model: str
    top1_pct: Percent
    train_px: Side | None = None
    test_px: Side | None = None
    std_pct: Percent | None = None
    num_seeds: Annotated[int, Field(ge=2)] | None = None
