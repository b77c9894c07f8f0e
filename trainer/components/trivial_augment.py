"""One operation per image at any strength."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trainer.base.streams import uniforms
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.geometry import INTERPOLATIONS
from trainer.components.pixels.operations import OPERATIONS

SIGNED = (
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
)


class TrivialAugment(FromOperations):
    """One operation per image, drawn from fourteen with a strength drawn from its whole range (the
    "Wide" ranges).

    num_bins: how many strengths each range is divided into.
    interpolation: how moved pixels are read.
    centered_shear: a shear leaves the image's middle where it is, and its strength is an angle in
        radians, up to a slope of 1.52: torchvision's before 0.12. Without it, the top or the left
        edge stays and the strength is the slope, up to 0.99: the paper's, and torchvision's since.

    Pixels that come from outside the image are black, whatever the data's mean. Images that are not
    RGB go without color: the other thirteen are drawn.

    Source: Mueller and Hutter 2021, arXiv:2103.10158, as torchvision's TrivialAugmentWide does it
    to PIL images.
    """

    name: Literal["trivial_augment"] = "trivial_augment"
    num_bins: Annotated[int, Field(ge=2)]
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    centered_shear: bool = False
    purpose: ClassVar[str] = "trivial_augment"
    example: ClassVar[dict[str, Any]] = {"num_bins": 31, "interpolation": "nearest"}

    @property
    def operations(self) -> tuple[str, ...]:
        """The fourteen."""
        return tuple(self._ranges())

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image of num_channels, for ids [B, 3] (epoch, sample, repeat);
        image_px plays no part.

        Gives operation [B] int64 as places in OPERATIONS and argument [B] float64.
        """
        which, strength, side = uniforms(seed, self.purpose, ids, 3).T
        left_out = self.left_out(num_channels)
        ranges = {name: levels for name, levels in self._ranges().items() if name not in left_out}
        choice = np.floor(which * len(ranges)).astype(np.int64)
        bins = np.floor(strength * self.num_bins).astype(np.int64)
        negative = (side < 0.5) & np.isin(
            choice, [place for place, name in enumerate(ranges) if name in SIGNED]
        )
        magnitude = np.stack(list(ranges.values()))[choice, bins] * np.where(negative, -1.0, 1.0)
        places = [OPERATIONS.index(self._placed(name)) for name in ranges]
        operation = np.array(places)[choice]
        return {"operation": operation, "argument": arguments(operation, magnitude)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The augmented images, [B, C, H, W] uint8 as before. `fill` is not used."""
        operation, argument = drawn["operation"][:, None], drawn["argument"][:, None]
        interpolation = torch.full_like(operation, INTERPOLATIONS.index(self.interpolation))
        return operate_in_turn(images, operation, argument, interpolation, (0,) * images.shape[1])

    def _placed(self, name: str) -> str:
        """The operation's name in OPERATIONS."""
        is_centered = self.centered_shear and name.startswith("shear")
        return f"centered_{name}" if is_centered else name

    def _ranges(self) -> dict[str, np.ndarray]:
        """The strengths of every operation, [num_bins] float64 each."""
        return ranges(self.num_bins, 0.99, 32.0, 135.0, 0.99, 6)


def ranges(
    num_bins: int, shear: float, shift_px: float, degrees: float, factor: float, most_bits: int
) -> dict[str, np.ndarray]:
    """The strengths of torchvision's operations from none to their ends, [num_bins] float64 each;
    float32 spacing, as torchvision's. most_bits: that posterize leaves out.
    """
    unused = np.zeros(num_bins)

    def spaced(start: float, end: float) -> np.ndarray:
        return torch.linspace(start, end, num_bins).double().numpy()

    bits = 8 - (torch.arange(num_bins) / ((num_bins - 1) / most_bits)).round()
    return {
        "identity": unused,
        "shear_x": spaced(0.0, shear),
        "shear_y": spaced(0.0, shear),
        "translate_x": spaced(0.0, shift_px),
        "translate_y": spaced(0.0, shift_px),
        "rotate": spaced(0.0, degrees),
        "brightness": spaced(0.0, factor),
        "color": spaced(0.0, factor),
        "contrast": spaced(0.0, factor),
        "sharpness": spaced(0.0, factor),
        "posterize": bits.double().numpy(),
        "solarize": spaced(255.0, 0.0),
        "autocontrast": unused,
        "equalize": unused,
    }


def arguments(operation: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Strengths in the operations' own units: factors around 1, and whole pixels, read against the
    movement.
    """
    is_named = {name: operation == OPERATIONS.index(name) for name in SIGNED}
    factors = (
        is_named["brightness"] | is_named["color"] | is_named["contrast"] | is_named["sharpness"]
    )
    shifts = is_named["translate_x"] | is_named["translate_y"]
    return np.where(factors, 1.0 + magnitude, np.where(shifts, -np.trunc(magnitude), magnitude))
