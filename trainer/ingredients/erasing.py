"""Rectangles of normalized images blotted out."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from trainer.ingredients.base import Ingredient, Share
from trainer.ingredients.boxes import NUM_ATTEMPTS, AreaRange, AspectRange, drawn_sides, drawn_start, first_fitting
from trainer.streams import device_normals, uniforms


class RandomErasing(Ingredient):
    """One box in some of the images is replaced by noise or by the mean.

    share: how many of the images, in [0, 1].
    area: bounds of the box's share of the image.
    aspect: bounds of its height / width.
    fill: "noise" is a standard normal number per value (timm's pixel mode); "mean" is zero, for the images are
        normalized (torchvision).

    Ten boxes are tried; an image in which none fits is left alone.

    Source: Zhong et al. 2017, arXiv:1708.04896; the rule is timm's and torchvision's, in distribution.
    """

    name: Literal["random_erasing"] = "random_erasing"
    share: Share
    area: AreaRange
    aspect: AspectRange
    fill: Literal["noise", "mean"]
    stage: ClassVar[str] = "normalized"

    def draw(self, seed: int, ids: np.ndarray, image_px: int) -> dict[str, np.ndarray]:
        """The box of each image of image_px x image_px, for ids [B, 3] (epoch, sample, repeat).

        Gives box [B, 4] int64 as (top, left, height, width) in px, all zero where nothing is erased, and
        noise_key [B] int64 below 2**32.
        """
        draws = uniforms(seed, "erase", ids, 2 * NUM_ATTEMPTS + 4)
        tried_h, tried_w = drawn_sides(draws[:, :-4], np.full(len(draws), image_px**2), self.area, self.aspect)
        found, height, width = first_fitting((tried_h < image_px) & (tried_w < image_px), tried_h, tried_w)
        top, left = drawn_start(draws[:, -4], image_px - height), drawn_start(draws[:, -3], image_px - width)
        is_erased = found & (draws[:, -2] < self.share)
        box = np.stack([top, left, height, width], axis=1) * is_erased[:, None]
        return {"box": box, "noise_key": (draws[:, -1] * 2.0**32).astype(np.int64)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """Erases the drawn boxes: images [B, C, H, W] float, normalized, to the same. `fill` is not used."""
        sizes = drawn["box"][:, 2] * drawn["box"][:, 3]
        erased = sizes.nonzero()[:, 0]
        if not len(erased):
            return images
        images = images.clone()
        num_values = images.shape[1] * int(sizes.max())
        keys = drawn["noise_key"][erased].to(images.device)
        # A value depends on its key and place alone, so how long the longest noise is changes none of them.
        noise = device_normals(keys, (num_values,)) if self.fill == "noise" else None
        for position, (image, box) in enumerate(zip(erased.tolist(), drawn["box"][erased].tolist(), strict=True)):
            top, left, height, width = box
            part = images[image, :, top : top + height, left : left + width]
            part.copy_(noise[position, : part.numel()].view(part.shape)) if noise is not None else part.zero_()
        return images
