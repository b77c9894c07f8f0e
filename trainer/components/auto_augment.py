"""Pairs of operations of a learned policy, as timm has them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from trainer.base.component import Positive
from trainer.base.streams import uniforms
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.policies import IMAGENET, V0
from trainer.components.rand_augment import ARGUMENTS, INCREASING, interpolations, levels

_PAIRS = {"original": IMAGENET, "originalr": IMAGENET, "v0": V0, "v0r": V0}
_BITS = {
    "original": lambda level, sign, px: np.trunc(level * 4) + 4,
    "originalr": INCREASING["posterize"],
    "v0": ARGUMENTS["posterize"],
    "v0r": INCREASING["posterize"],
}


class AutoAugment(FromOperations):
    """Two operations in a row: one of 25 learned pairs, each operation with a probability and at a
    level of its own.

    policy: "original" is the paper's on ImageNet, "v0" that of TensorFlow's EfficientNet; with an
    "r", posterize keeps fewer bits at a higher level, as in the paper's research code.
    magnitude_std: deviation of the level, which is clipped to [0, 10]; absent, it is the policy's.
    interpolation: how moved pixels are read; "random" draws bilinear or bicubic for each operation.

    Images that are not RGB go without color.
    Source: Cubuk et al. 2018, arXiv:1805.09501, as in timm (--aa original-mstd0.5).
    """

    name: Literal["auto_augment"] = "auto_augment"
    policy: Literal["original", "originalr", "v0", "v0r"]
    magnitude_std: Positive | None = None
    interpolation: Literal["bilinear", "bicubic", "random"]
    purpose: ClassVar[str] = "auto_augment"
    example: ClassVar[dict[str, Any]] = {"policy": "original", "interpolation": "random"}

    @property
    def operations(self) -> tuple[str, ...]:
        """Those of the policy."""
        return _PAIRS[self.policy].names

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image [num_channels, image_px, image_px], for ids [B, 3] (epoch,
        sample, repeat).

        Gives operation [B, 2] int64 as places in OPERATIONS (0 where none), argument [B, 2] float64
        and interpolation [B, 2] int64 as places in INTERPOLATIONS.
        """
        draws = uniforms(seed, self.purpose, ids, 9)
        whether, strength, side, filtering = draws[:, 1:].reshape(len(ids), 4, 2).swapaxes(0, 1)
        policy, left_out = _PAIRS[self.policy], self.left_out(num_channels)
        pair = np.floor(draws[:, 0] * len(policy.which)).astype(np.int64)
        which, sign = policy.which[pair], np.where(side < 0.5, 1.0, -1.0)
        level = levels(policy.level[pair], self.magnitude_std, strength)
        rules = ARGUMENTS | {"posterize": _BITS[self.policy]}
        argument = np.choose(which, [rules[name](level, sign, image_px) for name in policy.names])
        places = np.array(
            [0 if name in left_out else OPERATIONS.index(name) for name in policy.names]
        )
        return {
            "operation": np.where(whether < policy.share[pair], places[which], 0),
            "argument": argument,
            "interpolation": interpolations(self.interpolation, filtering),
        }

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The augmented images, [B, C, H, W] uint8 as before. fill: one value in 0..255 per
        channel.
        """
        return operate_in_turn(
            images, drawn["operation"], drawn["argument"], drawn["interpolation"], fill
        )
