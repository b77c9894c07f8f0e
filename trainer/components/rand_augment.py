"""A few operations per image, drawn from fifteen, at about one strength."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.special import ndtri
from torch import Tensor

from trainer.base.component import Positive, Share
from trainer.base.streams import uniforms
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.geometry import INTERPOLATIONS
from trainer.components.pixels.operations import OPERATIONS

_STRONGEST = 10.0  # the magnitude at which every operation is at its strongest
_DRAWS_PER_OP = 5  # which, whether, magnitude, sign, interpolation

# Level in [0, 1], sign and image size in px to the operation's argument. Truncation (np.trunc) is
# timm's int().
ARGUMENTS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "autocontrast": lambda level, sign, px: level,
    "equalize": lambda level, sign, px: level,
    "invert": lambda level, sign, px: level,
    "rotate": lambda level, sign, px: level * 30.0 * sign,
    "posterize": lambda level, sign, px: np.trunc(level * 4),
    "solarize": lambda level, sign, px: np.trunc(level * 256),
    "solarize_add": lambda level, sign, px: np.trunc(level * 110),
    "color": lambda level, sign, px: level * 1.8 + 0.1,
    "contrast": lambda level, sign, px: level * 1.8 + 0.1,
    "brightness": lambda level, sign, px: level * 1.8 + 0.1,
    "sharpness": lambda level, sign, px: level * 1.8 + 0.1,
    "shear_x": lambda level, sign, px: level * 0.3 * sign,
    "shear_y": lambda level, sign, px: level * 0.3 * sign,
    "translate_x": lambda level, sign, px: level * 0.45 * sign * px,
    "translate_y": lambda level, sign, px: level * 0.45 * sign * px,
}
INCREASING = ARGUMENTS | {
    "posterize": lambda level, sign, px: 4 - np.trunc(level * 4),
    "solarize": lambda level, sign, px: 256 - np.trunc(level * 256),
    **dict.fromkeys(
        ("color", "contrast", "brightness", "sharpness"),
        lambda level, sign, px: np.maximum(0.1, 1 + level * 0.9 * sign),
    ),
}


def levels(magnitude: float | np.ndarray, std: float | None, draws: np.ndarray) -> np.ndarray:
    """Strengths in [0, 1] of operations about a magnitude in [0, 10], as timm varies them."""
    varied = magnitude + (std * ndtri(draws) if std else 0 * draws)
    return varied.clip(0, _STRONGEST) / _STRONGEST


def interpolations(name: str, draws: np.ndarray) -> np.ndarray:
    """Places in INTERPOLATIONS; "random" is one or the other of two."""
    bilinear, bicubic = INTERPOLATIONS.index("bilinear"), INTERPOLATIONS.index("bicubic")
    bicubic_share = {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}[name]
    return np.where(draws < bicubic_share, bicubic, bilinear)


class RandAugment(FromOperations):
    """Some operations in a row, drawn with replacement from fifteen, all at about the same
    magnitude.

    num_ops: operations drawn per image.
    op_share: each of them is then done with this probability.
    magnitude, magnitude_std: mean and deviation of the normal distribution of the strength, which
        is clipped to [0, 10]; without a deviation every strength is the magnitude.
    increasing: every operation changes the image more at a higher magnitude (timm's "inc1");
        otherwise posterize and solarize change it less, and color, contrast, brightness and
        sharpness run from 0.1 up to 1.9.
    interpolation: how moved pixels are read; "random" draws bilinear or bicubic for each operation.

    Images that are not RGB go without color: the other fourteen are drawn.

    Source: Cubuk et al. 2019, arXiv:1909.13719, as in timm: op_share 0.5, a magnitude that varies,
    PIL operations, the fill colour of the training mean, translations by a share of the image.
    """

    name: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=16)]
    op_share: Share
    magnitude: Annotated[float, Field(ge=0, le=_STRONGEST)]
    magnitude_std: Positive | None = None
    increasing: bool = False
    interpolation: Literal["bilinear", "bicubic", "random"]
    purpose: ClassVar[str] = "rand_augment"
    example: ClassVar[dict[str, Any]] = {
        "num_ops": 2,
        "op_share": 0.5,
        "magnitude": 7.0,
        "interpolation": "random",
    }

    @property
    def operations(self) -> tuple[str, ...]:
        """The fifteen."""
        return tuple(ARGUMENTS)

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image [num_channels, image_px, image_px], for ids [B, 3] (epoch,
        sample, repeat).

        Gives operation [B, num_ops] int64 as places in OPERATIONS (0 where none), argument [B,
        num_ops] float64 and interpolation [B, num_ops] int64 as places in INTERPOLATIONS.
        """
        draws = uniforms(seed, self.purpose, ids, _DRAWS_PER_OP * self.num_ops)
        which, whether, strength, side, filtering = draws.reshape(
            len(draws), self.num_ops, -1
        ).transpose(2, 0, 1)
        rules, left_out = (
            INCREASING if self.increasing else ARGUMENTS,
            self.left_out(num_channels),
        )
        arguments = {name: rule for name, rule in rules.items() if name not in left_out}
        choice = np.floor(which * len(arguments)).astype(np.int64)
        level, sign = (
            levels(self.magnitude, self.magnitude_std, strength),
            np.where(side < 0.5, 1.0, -1.0),
        )
        argument = np.choose(choice, [rule(level, sign, image_px) for rule in arguments.values()])
        places = np.array([OPERATIONS.index(name) for name in arguments])[choice]
        return {
            "operation": np.where(whether < self.op_share, places, 0),
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
