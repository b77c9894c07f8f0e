"""The whole body of a model, rebuilt: the steps from a ResNet-50 to a ConvNeXt-T."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.surgery import Part, Swap

Count = Annotated[int, Field(ge=1, le=4096)]


class StagedBody(Part):
    example: ClassVar[dict[str, Any]] = {
        "depths": [3, 3, 9, 3], "widths": [96, 192, 384, 768], "block": "inverted_moved_up", "kernel_px": 7,
        "activations": "one", "norms": "one", "downsampling": "separate",
    }  # fmt: skip
    depths: tuple[Count, Count, Count, Count]
    widths: tuple[Count, Count, Count, Count]
    block: Literal["bottleneck", "depthwise", "inverted", "inverted_moved_up"]
    kernel_px: Annotated[int, Field(ge=1, le=31)]
    activations: Literal["all", "one"]
    norms: Literal["all", "one"]
    downsampling: Literal["in_block", "separate"]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError
