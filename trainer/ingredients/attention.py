"""Feature maps weighed by what the whole image shows."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.surgery import Part, Swap

Reduction = Annotated[int, Field(ge=1, le=256)]
Position = Literal["after_last_norm", "after_middle", "after_block"]
Stages = Annotated[int, Field(ge=1, le=4)]


class _Attention(Part):
    """position: where in a block. stages: of how many last stages; None for all."""

    position: Position
    stages: Stages | None = None

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class SqueezeExcite(_Attention):
    name: Literal["squeeze_excite"] = "squeeze_excite"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}
    reduction: Reduction


class Eca(_Attention):
    name: Literal["eca"] = "eca"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm"}
    kernel: Annotated[int, Field(ge=1, le=31)] | None = None


class Cbam(_Attention):
    name: Literal["cbam"] = "cbam"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16, "kernel": 7}
    reduction: Reduction
    kernel: Annotated[int, Field(ge=1, le=31)]


class Bam(Part):
    name: Literal["bam"] = "bam"
    example: ClassVar[dict[str, Any]] = {"reduction": 16, "dilation": 4, "num_convolutions": 2}
    reduction: Reduction
    dilation: Annotated[int, Field(ge=1, le=16)]
    num_convolutions: Annotated[int, Field(ge=1, le=8)]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class GlobalContext(_Attention):
    name: Literal["global_context"] = "global_context"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}
    reduction: Reduction


class CoordinateAttention(_Attention):
    name: Literal["coordinate_attention"] = "coordinate_attention"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 32}
    reduction: Reduction


Attention = Annotated[
    SqueezeExcite | Eca | Cbam | Bam | GlobalContext | CoordinateAttention, Field(discriminator="name")
]
