"""What a detector is: layers on a backbone, the loss of their outputs, and the boxes in them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from trainer.base.component import Component
from trainer.base.errors import PlanError
from trainer.components.losses import ImageLoss

NO_CLASS = -1  # of a row of padding among boxes

Open = Annotated[float, Field(gt=0, lt=1)]


class ConstantParts(NamedTuple):
    """A part of the loss of constant outputs: num_asked times the recipe's loss of the mean targets
    `shares` [K] float64, and box_loss, that of the best constant box.
    """

    num_asked: float
    shares: Tensor
    box_loss: float


class Detector(Component):
    """How boxes are found. Outputs are one tensor, [B, ...], whose meaning the detector knows."""

    kind: ClassVar[str] = "detector"

    @abstractmethod
    def build(self, body: nn.Module, num_classes: int) -> nn.Module:
        """The whole model on a timm model: images [B, C, H, W] to outputs. Draws from torch's
        global generator. Raises PlanError for a model whose features it cannot use.
        """

    @abstractmethod
    def check_side(self, key: str, image_px: int) -> None:
        """Refuse a side of images, image.<key> of a recipe. Raises PlanError."""

    @abstractmethod
    def loss(
        self, outputs: Tensor, boxes: Tensor, image_px: int, classification: ImageLoss
    ) -> Tensor:
        """The mean over images, a scalar. boxes: [B, M, 5] float, (left, top, right, bottom) in px
        of the images and the class; of rows without a box the class is NO_CLASS.
        """

    @abstractmethod
    def found(self, outputs: Tensor, image_px: int, seen_px: Tensor) -> Tensor:
        """The boxes in outputs, best first: [B, D, 6] float, (left, top, right, bottom) in px, the
        score in (0, 1) and the class; rows without a box have score 0 and NO_CLASS. seen_px: [B, 2]
        float, the width and height of each image within its padded square: no box reaches further.
        """

    @abstractmethod
    def constant_parts(
        self, boxes: Tensor, image_px: int, num_classes: int
    ) -> tuple[ConstantParts, ...]:
        """What the loss of images with `boxes` is the sum of where all outputs are the same."""

    if TYPE_CHECKING:  # a field of each class below

        @property
        def most_found(self) -> int: ...


def check_multiple(key: str, image_px: int, stride: int) -> None:
    """Refuse a side of images, image.<key>, that the last stride does not divide. Raises
    PlanError.
    """
    if image_px % stride:
        near = max(stride, round(image_px / stride) * stride)
        raise PlanError(
            f"image.{key} {image_px} is no multiple of {stride}, the stride of the last features",
            f'use set="image.{key}={near}"',
            path=("image", key),
            fix={f"image.{key}": near},
        )


def pyramid_levels(body: nn.Module, strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Which of a timm model's features have these strides, the last of each: (their places,
    their channels).

    Raises PlanError for a model that has no such features.
    """
    info = getattr(body, "feature_info", None) or []
    by_stride = {one["reduction"]: place for place, one in enumerate(info)}
    missing = [stride for stride in strides if stride not in by_stride]
    if missing or not hasattr(body, "forward_intermediates"):
        has = ", ".join(map(str, sorted(by_stride))) or "none"
        raise PlanError(
            f"model={type(body).__name__}: a detector needs features at strides"
            f" {', '.join(map(str, strides))}, it has {has}",
            "use a ResNet, a ConvNeXt or another model of several stages",
        )
    places = [by_stride[stride] for stride in strides]
    return places, [info[place]["num_chs"] for place in places]
