"""The first layers: how fast pixels become features."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.surgery import Part, Swap


class _Stem(Part):
    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class ImagenetStem(_Stem):
    name: Literal["imagenet"] = "imagenet"


class CifarStem(_Stem):
    name: Literal["cifar"] = "cifar"


class DeepStem(_Stem):
    name: Literal["deep"] = "deep"
    example: ClassVar[dict[str, Any]] = {"width": 32}
    width: Annotated[int, Field(ge=1, le=1024)]


class PatchifyStem(_Stem):
    name: Literal["patchify"] = "patchify"
    example: ClassVar[dict[str, Any]] = {"patch_px": 4}
    patch_px: Annotated[int, Field(ge=1, le=64)]


class AutoStem(_Stem):
    name: Literal["auto"] = "auto"


Stem = Annotated[ImagenetStem | CifarStem | DeepStem | PatchifyStem | AutoStem, Field(discriminator="name")]
