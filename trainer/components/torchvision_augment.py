"""Torchvision's own AutoAugment and RandAugment, which differ from timm's in operations and
strengths.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer.base.streams import uniforms
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.geometry import INTERPOLATIONS
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.policies import CIFAR10, IMAGENET, SVHN
from trainer.components.trivial_augment import SIGNED, arguments, ranges

_PAIRS = {"imagenet": IMAGENET, "cifar10": CIFAR10, "svhn": SVHN}
_POLICY_BINS = 10


def _strengths(num_bins: int, image_px: int) -> dict[str, np.ndarray]:
    found = ranges(num_bins, 0.3, 150.0 / 331.0 * image_px, 30.0, 0.9, 4)
    return found | {"invert": np.zeros(num_bins)}


class _Torchvisions(FromOperations):
    """Rounds of torchvision's operations on PIL images.

    interpolation: how moved pixels are read. Pixels that come from outside the image are black.
    """

    interpolation: Literal["nearest", "bilinear", "bicubic"]

    def _drawn(
        self,
        names: tuple[str, ...],
        which: np.ndarray,
        magnitude: np.ndarray,
        side: np.ndarray,
        num_channels: int,
    ) -> dict[str, np.ndarray]:
        """operation and argument [B, R] for places `which` in the names, magnitudes without a sign
        and draws of it.
        """
        left_out = self.left_out(num_channels)
        places = np.array([0 if name in left_out else OPERATIONS.index(name) for name in names])
        is_signed = np.array([name in SIGNED for name in names])[which]
        signed = magnitude * np.where(is_signed & (side < 0.5), -1.0, 1.0)
        operation = places[which]
        return {"operation": operation, "argument": arguments(operation, signed)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The augmented images, [B, C, H, W] uint8 as before. `fill` is not used."""
        operation, argument = drawn["operation"], drawn["argument"]
        interpolation = torch.full_like(operation, INTERPOLATIONS.index(self.interpolation))
        return operate_in_turn(images, operation, argument, interpolation, (0,) * images.shape[1])


class TorchvisionAutoAugment(_Torchvisions):
    """Two operations in a row: one of 25 learned pairs, each operation with a probability and at a
    level of its own.

    policy: the data that it was learned on. Images that are not RGB go without color.
    Source: Cubuk et al. 2018, arXiv:1805.09501, as torchvision's AutoAugment does it.
    """

    name: Literal["torchvision_auto_augment"] = "torchvision_auto_augment"
    policy: Literal["imagenet", "cifar10", "svhn"]
    purpose: ClassVar[str] = "torchvision_auto_augment"
    example: ClassVar[dict[str, Any]] = {"policy": "cifar10", "interpolation": "nearest"}

    @property
    def operations(self) -> tuple[str, ...]:
        """Those of the policy."""
        return _PAIRS[self.policy].names

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image [num_channels, image_px, image_px], for ids [B, 3] (epoch,
        sample, repeat).

        Gives operation [B, 2] int64 as places in OPERATIONS (0 where none), argument [B, 2]
        float64.
        """
        draws = uniforms(seed, self.purpose, ids, 5)
        policy = _PAIRS[self.policy]
        pair = np.floor(draws[:, 0] * len(policy.which)).astype(np.int64)
        which, level = policy.which[pair], policy.level[pair].astype(np.int64)
        strengths = _strengths(_POLICY_BINS, image_px)
        magnitude = np.stack([strengths[name] for name in policy.names])[which, level]
        drawn = self._drawn(policy.names, which, magnitude, draws[:, 3:], num_channels)
        is_done = draws[:, 1:3] < policy.share[pair]
        return drawn | {"operation": np.where(is_done, drawn["operation"], 0)}


class TorchvisionRandAugment(_Torchvisions):
    """Some operations in a row, drawn with replacement from fourteen, all at the same strength.

    num_ops: operations drawn per image. num_bins: how many strengths each range is divided into;
    magnitude: which of them, counted from 0. Images that are not RGB go without color.

    Raises ValueError for a magnitude beyond the bins.
    Source: Cubuk et al. 2019, arXiv:1909.13719, as torchvision's RandAugment does it.
    """

    name: Literal["torchvision_rand_augment"] = "torchvision_rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=16)]
    magnitude: Annotated[int, Field(ge=0)]
    num_bins: Annotated[int, Field(ge=2)]
    purpose: ClassVar[str] = "torchvision_rand_augment"
    example: ClassVar[dict[str, Any]] = {
        "num_ops": 2,
        "magnitude": 9,
        "num_bins": 31,
        "interpolation": "nearest",
    }

    @model_validator(mode="after")
    def _is_within(self) -> Self:
        if self.magnitude >= self.num_bins:
            raise ValueError(
                f"magnitude {self.magnitude} is beyond the {self.num_bins} bins; write"
                f" {self.num_bins - 1} at most"
            )
        return self

    @property
    def operations(self) -> tuple[str, ...]:
        """The fourteen."""
        return tuple(ranges(self.num_bins, 0.0, 0.0, 0.0, 0.0, 4))

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image [num_channels, image_px, image_px], for ids [B, 3] (epoch,
        sample, repeat).

        Gives operation [B, num_ops] int64 as places in OPERATIONS, argument [B, num_ops] float64.
        """
        draws = uniforms(seed, self.purpose, ids, 2 * self.num_ops)
        left_out = self.left_out(num_channels)
        names = tuple(name for name in self.operations if name not in left_out)
        which = np.floor(draws[:, : self.num_ops] * len(names)).astype(np.int64)
        strengths = _strengths(self.num_bins, image_px)
        magnitude = np.array([strengths[name][self.magnitude] for name in names])[which]
        return self._drawn(names, which, magnitude, draws[:, self.num_ops :], num_channels)
