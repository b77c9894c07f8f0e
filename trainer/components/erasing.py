"""Rectangles of normalized images blotted out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from trainer.base.component import Share
from trainer.base.streams import device_normals, uniforms
from trainer.components.augmentation import InKernel, OfNormalized
from trainer.components.boxes import (
    NUM_ATTEMPTS,
    AreaRange,
    AspectRange,
    drawn_sides,
    drawn_start,
    first_fitting,
)
from trainer.components.epochs import NumEpochs, until_epochs_in
from trainer.components.transfer import on


class RandomErasing(OfNormalized):
    """One box in some of the images is replaced by noise or by the mean.

    share: how many of the images, in [0, 1].
    area: bounds of the box's share of the image.
    aspect: bounds of its height / width.
    until_epochs: from this epoch on, counted from 0, nothing is erased.
    fill: "noise" is a standard normal number per value (timm's pixel mode); "mean" is zero, as the
        images are normalized (torchvision).

    Ten boxes are tried; an image in which none fits is left alone.

    Source: Zhong et al. 2017, arXiv:1708.04896; the rule is timm's and torchvision's, in
    distribution.
    """

    name: Literal["random_erasing"] = "random_erasing"
    share: Share
    area: AreaRange
    aspect: AspectRange
    fill: Literal["noise", "mean"]
    until_epochs: NumEpochs | None = None
    purpose: ClassVar[str] = "erase"
    example: ClassVar[dict[str, Any]] = {
        "share": 0.25,
        "area": (0.02, 0.33),
        "aspect": (0.3, 3.3),
        "fill": "noise",
    }

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        until = until_epochs_in(epochs, epochs_before, self.until_epochs)
        return self.model_copy(update={"until_epochs": until})

    def lengths(self, epochs: int) -> Iterator[tuple[str, float, float]]:
        if self.until_epochs is not None:
            yield "until_epochs", self.until_epochs, epochs - 1

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """The box of each image of image_px x image_px, for ids [B, 3] (epoch, sample, repeat).

        Gives box [B, 4] int64 as (top, left, height, width) in px, all zero where nothing is
        erased, and noise_key [B] int64 below 2**32.
        """
        draws = uniforms(seed, self.purpose, ids, 2 * NUM_ATTEMPTS + 4)
        tried_h, tried_w = drawn_sides(
            draws[:, :-4], np.full(len(draws), image_px**2), self.area, self.aspect
        )
        found, height, width = first_fitting(
            (tried_h < image_px) & (tried_w < image_px), tried_h, tried_w
        )
        top, left = (
            drawn_start(draws[:, -4], image_px - height),
            drawn_start(draws[:, -3], image_px - width),
        )
        is_erased = found & (draws[:, -2] < self.share)
        if self.until_epochs is not None:
            is_erased &= ids[:, 0] < self.until_epochs
        box = np.stack([top, left, height, width], axis=1) * is_erased[:, None]
        return {"box": box, "noise_key": (draws[:, -1] * 2.0**32).astype(np.int64)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """Erases the drawn boxes: images [B, C, H, W] float, normalized, to the same. `fill` is not
        used.
        """
        boxes = drawn["box"].numpy()
        erased = np.flatnonzero(boxes[:, 2] * boxes[:, 3])
        if not len(erased):
            return images
        which, position, place = _values(images, erased, boxes[erased])
        values = torch.zeros(place.shape, dtype=images.dtype, device=images.device)
        if self.fill == "noise":
            keys = on(images.device, drawn["noise_key"].numpy()[erased])
            values = device_normals(keys, which, position).to(images.dtype)
        images = images.clone(memory_format=torch.contiguous_format)
        images.view(-1).scatter_(0, place, values)
        return images

    def in_kernel(self, drawn: dict[str, Tensor]) -> InKernel:
        key = drawn["noise_key"].numpy() if self.fill == "noise" else None
        return InKernel(box=drawn["box"].numpy(), noise_key=key)


def _values(images: Tensor, rows: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """All values in one box of each of some images [B, C, H, W], one after another on their device.

    rows: [N] the images. boxes: [N, 4] as drawn, none empty. Gives three of [M] int64: which box a
    value is in, its place in it, and its place in all images. By one copy to the device and a few
    calls, whatever N is.
    """
    num_channels, image_height, image_width = images.shape[1:]
    top, left, height, width = boxes.T
    first = (rows * num_channels * image_height + top) * image_width + left
    num_values = num_channels * height * width
    each = np.stack([first, num_values.cumsum() - num_values, num_values, height * width, width])
    first, before, counts, box_px, width = on(images.device, each)
    which = torch.repeat_interleave(counts, output_size=int(num_values.sum()))
    position = torch.arange(len(which), device=images.device) - before[which]
    channel, inside = _divided(position, box_px[which])
    row, column = _divided(inside, width[which])
    return which, position, first[which] + (channel * image_height + row) * image_width + column


def _divided(numbers: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Quotients and rests, by one division: of whole numbers it is slow."""
    quotients = numbers // by
    return quotients, numbers - quotients * by
