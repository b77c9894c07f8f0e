"""Colours and sharpness of some of the images: jitter, grey, solarized, blurred."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from trainer.base.component import Positive, Share
from trainer.base.errors import UserError
from trainer.base.streams import uniforms
from trainer.components.augmentation import OfPixels
from trainer.components.boxes import ascending
from trainer.components.pixels.blur import box_blurred, gaussian_blurred
from trainer.components.pixels.channels import FromOperations
from trainer.components.pixels.choice import operate_in_turn
from trainer.components.pixels.hue import hue_turned
from trainer.components.pixels.operations import OPERATIONS, changed_where
from trainer.components.transfer import on


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"{number} has no middle; write {number + 1}")
    return number


Radii = Annotated[tuple[Positive, Positive], AfterValidator(ascending)]
Threshold = Annotated[int, Field(ge=0, le=256)]
_GREY, _SOLARIZE = OPERATIONS.index("color"), OPERATIONS.index("solarize")


class _InTurn(FromOperations):
    """Draws rounds of operations that move no pixels."""

    keeps_places: ClassVar[bool] = True

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The changed images, [B, C, H, W] uint8 as before. `fill` is not used."""
        operation, argument = drawn["operation"], drawn["argument"]
        return operate_in_turn(images, operation, argument, torch.zeros_like(operation), fill)


class ColorJitter(_InTurn):
    """Brightness, contrast and saturation times factors that are drawn for each image, in a drawn
    order.

    brightness, contrast, saturation: the most that a factor is away from 1, at least down to 0;
    absent, it is left alone. share: how many of the images are changed, absent for all.

    Images that are not RGB go without saturation.

    Raises ValueError where all three are absent.
    Source: torchvision's ColorJitter on PIL images, without its hue (`hue_jitter`); timm's
    --color-jitter 0.4 is 0.4 for all three.
    """

    name: Literal["color_jitter"] = "color_jitter"
    brightness: Positive | None = None
    contrast: Positive | None = None
    saturation: Positive | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    purpose: ClassVar[str] = "color_jitter"
    example: ClassVar[dict[str, Any]] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self._most():
            raise ValueError("brightness, contrast and saturation are all absent: give one")
        return self

    @property
    def operations(self) -> tuple[str, ...]:
        """Those that are on."""
        return tuple(self._most())

    def _most(self) -> dict[str, float]:
        each = {"brightness": self.brightness, "contrast": self.contrast, "color": self.saturation}
        return {name: most for name, most in each.items() if most is not None}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """What is done to each image of num_channels, for ids [B, 3] (epoch, sample, repeat).

        Gives operation [B, n] int64 as places in OPERATIONS (0 where none) and argument [B, n]
        float64, the factors, for the n that are on.
        """
        draws = uniforms(seed, self.purpose, ids, 7)
        left_out = self.left_out(num_channels)
        most = {name: each for name, each in self._most().items() if name not in left_out}
        order = draws[:, 1 : 1 + len(most)].argsort(axis=1)
        away = np.array(list(most.values()))
        low = np.maximum(0.0, 1 - away)
        factor = low + (1 + away - low) * draws[:, 4 : 4 + len(most)]
        places = np.array([OPERATIONS.index(name) for name in most], dtype=np.int64)[order]
        is_done = draws[:, :1] < (1.0 if self.share is None else self.share)
        return {
            "operation": np.where(is_done, places, 0),
            "argument": np.take_along_axis(factor, order, axis=1),
        }


class HueJitter(OfPixels):
    """The hue is turned by an angle that is drawn for each image.

    most: of the angle, in turns, one way or the other. share: how many of the images are changed,
    absent for all. These change a little even where the angle is none: hues have 256 steps.

    Images that are not RGB stay as they are.
    Source: the hue of torchvision's ColorJitter on PIL images, which turns it at a drawn place
    among the other three; here it is an augmentation of its own, where it stands.
    """

    name: Literal["hue_jitter"] = "hue_jitter"
    most: Annotated[float, Field(gt=0, le=0.5)]
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    purpose: ClassVar[str] = "hue_jitter"
    example: ClassVar[dict[str, Any]] = {"most": 0.1}

    def left_out(self, num_channels: int) -> tuple[str, ...]:
        return () if num_channels == 3 else ("hue",)

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """shift [B] int64: steps of 256 that the hue is turned by, -1 where it is not."""
        whether, angle = uniforms(seed, self.purpose, ids, 2).T
        shift = np.trunc(255 * self.most * (2 * angle - 1)).astype(np.int64) % 256
        is_done = whether < (1.0 if self.share is None else self.share)
        return {"shift": np.where(is_done & (num_channels == 3), shift, -1)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The changed images, [B, C, H, W] uint8 as before. `fill` is not used."""
        shift = drawn["shift"]

        def change(members: Tensor, places: np.ndarray) -> Tensor:
            return hue_turned(members, on(members.device, shift.numpy()[places]))

        return changed_where(images, (shift >= 0).numpy(), change)


class _Sometimes(_InTurn):
    """One operation with one argument, in some of the images."""

    share: Share

    def _drawn(
        self, seed: int, ids: np.ndarray, place: int, argument: float
    ) -> dict[str, np.ndarray]:
        is_done = uniforms(seed, self.purpose, ids, 1) < self.share
        return {
            "operation": np.where(is_done, place, 0),
            "argument": np.full(is_done.shape, argument),
        }


class Grayscale(_Sometimes):
    """Some of the images lose their colour: all channels are their luma.

    share: how many of them, in [0, 1]. Images that are not RGB stay as they are.
    Source: torchvision's RandomGrayscale on PIL images.
    """

    name: Literal["grayscale"] = "grayscale"
    purpose: ClassVar[str] = "grayscale"
    operations: ClassVar[tuple[str, ...]] = ("color",)
    example: ClassVar[dict[str, Any]] = {"share": 0.2}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """operation [B, 1] int64 as a place in OPERATIONS (0 where none), argument [B, 1]."""
        return self._drawn(seed, ids, 0 if self.left_out(num_channels) else _GREY, 0.0)


class Solarize(_Sometimes):
    """In some of the images all values from a threshold on are inverted.

    share: how many of them, in [0, 1]. threshold: in 0 .. 256.
    Source: torchvision's RandomSolarize.
    """

    name: Literal["solarize"] = "solarize"
    threshold: Threshold
    purpose: ClassVar[str] = "solarize"
    operations: ClassVar[tuple[str, ...]] = ("solarize",)
    example: ClassVar[dict[str, Any]] = {"share": 0.2, "threshold": 128}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """operation [B, 1] int64 as a place in OPERATIONS (0 where none), argument [B, 1]."""
        return self._drawn(seed, ids, _SOLARIZE, float(self.threshold))


class GaussianBlur(OfPixels):
    """Some of the images are blurred, by a radius that is drawn for each.

    share: how many of them, in [0, 1]. radius_px: bounds of the Gaussian's deviation.
    kernel_px: a Gaussian of that many pixels a side, the image mirrored at its border
    (torchvision's; timm has 23); absent, three box blurs after one another, the outermost pixels
    repeated (PIL's, as DeiT III has it).

    Raises UserError for a kernel that is larger than the images.
    """

    name: Literal["gaussian_blur"] = "gaussian_blur"
    share: Share
    radius_px: Radii
    kernel_px: Annotated[int, Field(ge=3, le=255), AfterValidator(_odd)] | None = None
    purpose: ClassVar[str] = "gaussian_blur"
    keeps_places: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"share": 0.5, "radius_px": (0.1, 2.0)}

    def check(self, plan) -> None:
        smallest_px = plan.train_px_at(0)
        if self.kernel_px is not None and self.kernel_px // 2 >= smallest_px:
            raise UserError(
                f"augment.{self.name}: kernel_px {self.kernel_px} is too large for images of"
                f" {smallest_px} px; make it {smallest_px // 10 * 2 + 1}"
            )

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """radius [B] float64 in px, 0 where an image is not blurred."""
        whether, size = uniforms(seed, self.purpose, ids, 2).T
        return {"radius": np.where(whether < self.share, _between(self.radius_px, size), 0.0)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        return _blurred(images, drawn["radius"].numpy(), self.kernel_px)


class ThreeAugment(_InTurn):
    """Each image is turned grey, solarized or blurred, a third of them each.

    threshold: of solarizing. radius_px: bounds of the blur's radius, PIL's.

    Images that are not RGB are solarized or blurred, half of them each. Its source follows it with
    a color_jitter of 0.3, which is an augmentation of its own here.
    Source: Touvron et al. 2022, arXiv:2204.07118 (DeiT III); timm's --aa 3a.
    """

    name: Literal["three_augment"] = "three_augment"
    threshold: Threshold
    radius_px: Radii
    purpose: ClassVar[str] = "three_augment"
    operations: ClassVar[tuple[str, ...]] = ("color", "solarize")
    example: ClassVar[dict[str, Any]] = {"threshold": 128, "radius_px": (0.1, 2.0)}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """operation [B, 1] int64 as a place in OPERATIONS (0 where none), argument [B, 1] and
        radius [B] float64 in px (0 where an image is not blurred).
        """
        which, size = uniforms(seed, self.purpose, ids, 2).T
        places = np.array([0, _SOLARIZE] if self.left_out(num_channels) else [0, _SOLARIZE, _GREY])
        operation = places[np.floor(which * len(places)).astype(np.int64)]
        return {
            "operation": operation[:, None],
            "argument": np.where(operation == _SOLARIZE, float(self.threshold), 0.0)[:, None],
            "radius": np.where(operation == 0, _between(self.radius_px, size), 0.0),
        }

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        return _blurred(super().apply(images, drawn, fill), drawn["radius"].numpy(), None)


def _between(bounds: tuple[float, float], draws: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * draws


def _blurred(images: Tensor, radius: np.ndarray, kernel_px: int | None) -> Tensor:
    """Images [B, C, H, W] uint8, blurred where the radius [B] is not 0."""

    def change(members: Tensor, places: np.ndarray) -> Tensor:
        if kernel_px is None:
            return box_blurred(members, radius[places])
        return gaussian_blurred(members, radius[places], kernel_px)

    return changed_where(images, radius > 0, change)
