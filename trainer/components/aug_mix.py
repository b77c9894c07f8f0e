"""Images blended with chains of operations on themselves."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.special import betaincinv, gammaincinv
from torch import Tensor

from trainer.base.component import Positive
from trainer.base.streams import uniforms
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.color import blend, to_bytes
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.rand_augment import INCREASING, interpolations, levels
from trainer.components.transfer import on

_MOST_DEPTH = 3  # of a chain whose depth is drawn
_SHIFT_SHARE = 0.3 / 0.45  # timm moves by at most 0.3 of the side here, 0.45 in RandAugment
_LEFT_OUT = ("invert", "solarize_add")
_RULES = {name: rule for name, rule in INCREASING.items() if name not in _LEFT_OUT}


class AugMix(FromOperations):
    """The image blended with a mixture of chains: each some operations in a row, drawn with
    replacement from thirteen.

    width: chains; depth: operations of each, absent for a drawn number from 1 to 3.
    magnitude, magnitude_std: of the strengths; without a deviation each is drawn evenly from 0 to
    the magnitude. alpha: of the Dirichlet distribution of the chains' weights, and of the Beta
    distribution of the mixture's share of the image.
    interpolation: how moved pixels are read; "random" draws bilinear or bicubic for each operation.

    Images that are not RGB go without color: the other twelve are drawn.
    Source: Hendrycks et al. 2019, arXiv:1912.02781, as in timm (--aa augmix-m3-w3), which adds four
    operations to the paper's; there and here without normalization before the blend.
    """

    name: Literal["aug_mix"] = "aug_mix"
    width: Annotated[int, Field(ge=1, le=16)]
    depth: Annotated[int, Field(ge=1, le=16)] | None = None
    magnitude: Annotated[float, Field(ge=0, le=10)]
    magnitude_std: Positive | None = None
    alpha: Positive
    interpolation: Literal["bilinear", "bicubic", "random"]
    purpose: ClassVar[str] = "aug_mix"
    example: ClassVar[dict[str, Any]] = {
        "width": 3,
        "magnitude": 3.0,
        "alpha": 1.0,
        "interpolation": "bilinear",
    }

    @property
    def operations(self) -> tuple[str, ...]:
        """The thirteen."""
        return tuple(_RULES)

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image [num_channels, image_px, image_px], for ids [B, 3] (epoch,
        sample, repeat).

        Gives for W chains of at most D operations: operation [B, W, D] int64 as places in
        OPERATIONS (0 where none), argument [B, W, D] float64, interpolation [B, W, D] int64 as
        places in INTERPOLATIONS, weight [B, W] float32 and share [B] float64, of the mixture.
        """
        depth = self.depth or _MOST_DEPTH
        size = len(ids), self.width, depth
        draws = uniforms(seed, self.purpose, ids, 1 + 2 * self.width + 4 * self.width * depth)
        of_chains = draws[:, 1 : 1 + 2 * self.width].reshape(len(ids), self.width, 2)
        which, strength, side, filtering = np.moveaxis(
            draws[:, 1 + 2 * self.width :].reshape(*size, 4), -1, 0
        )
        rules = {
            name: rule for name, rule in _RULES.items() if name not in self.left_out(num_channels)
        }
        choice = np.floor(which * len(rules)).astype(np.int64)
        level, sign = self._levels(strength), np.where(side < 0.5, 1.0, -1.0)
        argument = np.choose(choice, [rule(level, sign, image_px) for rule in rules.values()])
        operation = np.array([OPERATIONS.index(name) for name in rules])[choice]
        shifts = [OPERATIONS.index(f"translate_{axis}") for axis in "xy"]
        argument = np.where(np.isin(operation, shifts), argument * _SHIFT_SHARE, argument)
        if self.depth is None:
            length = 1 + np.floor(of_chains[:, :, :1] * _MOST_DEPTH)
            operation = np.where(np.arange(depth) < length, operation, 0)
        # Gamma numbers in proportion are Dirichlet's; a draw of 0 has a neighbour above it.
        gamma = gammaincinv(self.alpha, of_chains[:, :, 1] + 2.0**-33)
        return {
            "operation": operation,
            "argument": argument,
            "interpolation": interpolations(self.interpolation, filtering),
            "weight": (gamma / gamma.sum(1, keepdims=True)).astype(np.float32),
            "share": betaincinv(self.alpha, self.alpha, draws[:, 0]),
        }

    def _levels(self, draws: np.ndarray) -> np.ndarray:
        if self.magnitude_std is None:
            return self.magnitude * draws / 10
        return levels(self.magnitude, self.magnitude_std, draws)

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The augmented images, [B, C, H, W] uint8 as before. fill: one value in 0..255 per
        channel.
        """
        mixed = torch.zeros(images.shape, dtype=torch.float32, device=images.device)
        for chain in range(self.width):
            operation, argument, interpolation = (
                drawn[key][:, chain] for key in ("operation", "argument", "interpolation")
            )
            chained = operate_in_turn(images, operation, argument, interpolation, fill)
            weight = on(images.device, drawn["weight"][:, chain].numpy())[:, None, None, None]
            mixed += chained.float() * weight
        return blend(images.float(), to_bytes(mixed).float(), drawn["share"].numpy())
