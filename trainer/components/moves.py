"""Images moved as a whole, by no fraction of a pixel."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trainer.base.component import Share
from trainer.base.errors import UserError
from trainer.base.streams import uniforms
from trainer.components.augmentation import OfPixels
from trainer.components.boxes import drawn_start
from trainer.components.pixels.operations import changed_where
from trainer.components.transfer import colour_on, on


class VerticalFlip(OfPixels):
    """Top and bottom change places in some of the images.

    share: how many of them, in [0, 1].
    """

    name: Literal["vertical_flip"] = "vertical_flip"
    share: Share
    purpose: ClassVar[str] = "vertical_flip"
    example: ClassVar[dict[str, Any]] = {"share": 0.5}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """Whether each image is flipped: is_flipped [B] bool, for ids [B, 3]."""
        return {"is_flipped": uniforms(seed, self.purpose, ids, 1)[:, 0] < self.share}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        return changed_where(
            images, drawn["is_flipped"].numpy(), lambda rows, _: rows.flip(2).contiguous()
        )


class PadCrop(OfPixels):
    """Each image is padded on all four sides, and a part of its own size is cut out at a drawn
    place: it moves by up to pad_px in each direction.

    pad_px: at the training size. padding: what comes from outside: "black", the data's "mean", or
    the image itself mirrored at its outermost pixels ("reflect").

    Raises UserError where the images are not larger than the padding.
    Sources: torchvision's RandomCrop with padding (black on CIFAR: He et al. 2015,
    arXiv:1512.03385; reflect: Touvron et al. 2022, arXiv:2204.07118, simple random crop).
    """

    name: Literal["pad_crop"] = "pad_crop"
    pad_px: Annotated[int, Field(ge=1, le=512)]
    padding: Literal["black", "mean", "reflect"]
    purpose: ClassVar[str] = "pad_crop"
    example: ClassVar[dict[str, Any]] = {"pad_px": 4, "padding": "black"}

    def check(self, plan) -> None:
        smallest_px = plan.train_px_at(0)
        if self.pad_px >= smallest_px:
            raise UserError(
                f"augment.{self.name}: pad_px {self.pad_px} is no part of images of {smallest_px}"
                f" px; make it {smallest_px // 8}"
            )

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """Where each image is cut out of the padded one: start [B, 2] int64 as (top, left), in
        0 .. 2 * pad_px.
        """
        draws = uniforms(seed, self.purpose, ids, 2)
        return {"start": drawn_start(draws, np.array(2 * self.pad_px))}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The moved images, [B, C, H, W] uint8 as before. fill: the data's mean per channel."""
        device, start = images.device, drawn["start"].numpy() - self.pad_px
        down, across = (
            start[:, place, None] + np.arange(side) for place, side in enumerate(images.shape[2:])
        )
        if self.padding == "reflect":
            return _cut_out(images, _mirrored(down), _mirrored(across))
        there = [on(device, (each >= 0) & (each < each.shape[1])) for each in (down, across)]
        is_there = there[0][:, None, :, None] & there[1][:, None, None, :]
        colour = fill if self.padding == "mean" else (0,) * images.shape[1]
        moved = _cut_out(images, *(each.clip(0, each.shape[1] - 1) for each in (down, across)))
        return torch.where(is_there, moved, colour_on(device, colour))


def _mirrored(places: np.ndarray) -> np.ndarray:
    """Places [B, side] along a side as those of pixels that are there, mirrored at the outermost
    ones.
    """
    last = places.shape[1] - 1
    return last - np.abs(last - np.abs(places))


def _cut_out(images: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """The pixels of each image at its own rows [B, H] and columns [B, W]: [B, C, H, W]."""
    which = torch.arange(len(images), device=images.device)[:, None, None]
    down, across = on(images.device, rows)[:, :, None], on(images.device, columns)[:, None, :]
    return images[which, :, down, across].permute(0, 3, 1, 2).contiguous()
