"""What an augmentation is: the four classes that every one derives from, by where in a sample's way
it stands.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from torch import Tensor

from trainer.base.component import Component
from trainer.base.errors import UserError

AugmentationStage = Literal["decode", "pixels", "normalized"]


class InKernel(NamedTuple):
    """What one kernel does to normalized images while it makes the model's input of them.

    colour: added, [B, C] float32. box: erased, [B, 4] int64 as (top, left, height, width) in px,
    empty where nothing is. noise_key: of the noise in it, [B] int64 below 2**32; None leaves zeros.
    """

    colour: np.ndarray | None = None
    box: np.ndarray | None = None
    noise_key: np.ndarray | None = None


class Augmentation(Component):
    """One augmentation; derive from Crop, Mirror, OfPixels or OfNormalized, which say when it
    happens.

    purpose: each augmentation names a random stream of its own; two of one stream would draw the
    same numbers. stage: "decode", by the loader; "pixels", on uint8 images of the training size;
    "normalized", on what the model sees. crops, flips: what one of stage "decode" does.
    keeps_places: it leaves everything in an image where it is, and in sight, as targets with places
    ask of what comes after the crop. needs_rgb: it is about red, green and blue, and refused for
    other images.
    """

    kind: ClassVar[str] = "augmentation"
    crops: ClassVar[bool] = False
    flips: ClassVar[bool] = False
    keeps_places: ClassVar[bool] = False
    needs_rgb: ClassVar[bool] = False

    @property
    @abstractmethod
    def purpose(self) -> str:
        """The name of its random stream."""

    @property
    @abstractmethod
    def stage(self) -> AugmentationStage:
        """When it happens."""

    def with_least_area(self, share: float) -> Self:
        """The same, showing at least this share of an image: what a profile of small images asks
        for (crop_area).
        """
        return self

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        """The same in a run of other length: what it counts in epochs keeps its share of the
        run.
        """
        return self

    def lengths(self, epochs: int) -> Iterator[tuple[str, float, float]]:
        """(field, epochs in it, the most that a run of `epochs` has room for) of each field that
        counts in epochs.
        """
        return iter(())

    def left_out(self, num_channels: int) -> tuple[str, ...]:
        """What it does not do for images of so many channels, to be noted in a plan."""
        return ()

    def check_channels(self, num_channels: int) -> None:
        """Refuse images that are not red, green and blue, where it needs them. Raises UserError."""
        if self.needs_rgb and num_channels != 3:
            found = f"these images have {num_channels} channel{'s' * (num_channels != 1)}"
            remedy = f'use set="augment.{self.name}=null"'
            raise UserError(
                f"augment.{self.name}: it is about red, green and blue; {found}; {remedy}"
            )

    def check(self, plan) -> None:
        self.check_channels(plan.profile.channels)


class Crop(Augmentation):
    """Chooses the part of an image that is resized to the training size."""

    stage: ClassVar[AugmentationStage] = "decode"
    crops: ClassVar[bool] = True

    @property
    def antialias(self) -> bool:
        """Does its resize smooth what it makes smaller, as PIL's does?"""
        return True

    def check_settings(self, plan, settings) -> None:
        if settings.loader == "ffcv" and not self.antialias:
            raise UserError(
                f"loader=ffcv: it smooths what it makes smaller, augment.{self.name} does not;"
                " use loader=torch"
            )

    @abstractmethod
    def draw(
        self, seed: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [B, 4] int64 as (top, left, height, width) in px, and whether each resize is
        bicubic [B] bool.

        ids: [B, 3] (epoch, sample, repeat). heights, widths: [B], the sizes of the whole images in
        px.
        """


class Mirror(Augmentation):
    """Chooses the images whose left and right change places."""

    stage: ClassVar[AugmentationStage] = "decode"
    flips: ClassVar[bool] = True

    @abstractmethod
    def draw(self, seed: int, ids: np.ndarray) -> np.ndarray:
        """Whether each image is flipped: [B] bool, for ids [B, 3] (epoch, sample, repeat)."""


class _OfTensors(Augmentation):
    """Draws its parameters on the CPU, and is a deterministic function of images and parameters on
    any device.
    """

    @abstractmethod
    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """The parameters by name, [B, ...] each, for ids [B, 3] (epoch, sample, repeat).

        Of images [num_channels, image_px, image_px]. By `streams.uniforms(seed, self.purpose, ids,
        num_draws)`.
        """

    @abstractmethod
    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """The augmented images, of the same shape and dtype. fill: one grey level in 0..255 per
        channel.
        """


class OfPixels(_OfTensors):
    """Changes uint8 images [B, C, H, W] of the training size."""

    stage: ClassVar[AugmentationStage] = "pixels"


class OfNormalized(_OfTensors):
    """Changes normalized float images [B, C, H, W]."""

    stage: ClassVar[AugmentationStage] = "normalized"

    def in_kernel(self, drawn: dict[str, Tensor]) -> InKernel | None:
        """What a GPU may do in place of `apply`, with the same result up to rounding; None: nothing
        that InKernel can say.
        """
        return None
