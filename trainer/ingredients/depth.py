"""What is left out at random, or starts small, along the depth of a model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.surgery import Part, Swap


class StochasticDepth(Part):
    """How the page's drop_path acts: `model.stochastic_depth`. Not in a union."""

    example: ClassVar[dict[str, Any]] = {"over_depth": "constant", "per": "batch"}
    over_depth: Literal["linear", "constant"]
    per: Literal["sample", "batch"]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class DropBlock(Part):
    """`model.drop_block`. Not in a union."""

    example: ClassVar[dict[str, Any]] = {"rate": 0.1, "block_px": 7, "stages": 2}
    rate: Annotated[float, Field(gt=0, lt=1)]
    block_px: Annotated[int, Field(ge=1, le=64)]
    stages: Annotated[int, Field(ge=1, le=4)]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class LayerScale(Part):
    """Made from `model.layer_scale: 1.0e-6`; the page gives the number alone."""

    example: ClassVar[dict[str, Any]] = {"start": 1e-6}
    start: Annotated[float, Field(gt=0, lt=1)]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError
