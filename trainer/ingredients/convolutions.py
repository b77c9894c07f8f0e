"""How the 3x3 convolutions look at their neighbourhood, and how strided ones leave pixels out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.surgery import Part, Swap

Stages = Annotated[int, Field(ge=1, le=4)]


class _Convolution(Part):
    """stages: of how many last stages."""

    stages: Stages

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class Deformable(_Convolution):
    name: Literal["deformable"] = "deformable"
    example: ClassVar[dict[str, Any]] = {"stages": 1}


class SelfCalibrated(_Convolution):
    name: Literal["self_calibrated"] = "self_calibrated"
    example: ClassVar[dict[str, Any]] = {"stages": 4, "pooling": 4}
    pooling: Annotated[int, Field(ge=2, le=16)]


class Dilated(_Convolution):
    name: Literal["dilated"] = "dilated"
    example: ClassVar[dict[str, Any]] = {"stages": 1}


Convolution = Annotated[Deformable | SelfCalibrated | Dilated, Field(discriminator="name")]


class BlurPool(Part):
    """Not in a union: `model.blur_pool: {filter_px: 3, min_channels: 16}`."""

    example: ClassVar[dict[str, Any]] = {"filter_px": 3, "min_channels": 16}
    filter_px: Annotated[int, Field(ge=2, le=7)]
    min_channels: Annotated[int, Field(ge=1)] | None = None

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError
