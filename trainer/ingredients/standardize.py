"""The weights of a convolution, standardized before they are used."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.base import Positive
from trainer.ingredients.surgery import Part, Swap

Epsilon = Annotated[float, Field(gt=0, le=1)]
Of = Literal["followed_by_norm", "all"]


class WeightStandardization(Part):
    name: Literal["weight_standardization"] = "weight_standardization"
    example: ClassVar[dict[str, Any]] = {
        "of": "followed_by_norm", "depthwise": False, "variance": "unbiased", "eps": 1e-5, "eps_place": "outside",
    }  # fmt: skip
    of: Of
    depthwise: bool
    variance: Literal["biased", "unbiased"]
    eps: Epsilon
    eps_place: Literal["inside", "outside"]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class ScaledWeightStandardization(Part):
    name: Literal["scaled_weight_standardization"] = "scaled_weight_standardization"
    example: ClassVar[dict[str, Any]] = {"of": "all", "depthwise": True, "gamma": 1.7139588594436646, "eps": 1e-6}
    of: Of
    depthwise: bool
    gamma: Positive
    eps: Epsilon

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


Standardization = Annotated[WeightStandardization | ScaledWeightStandardization, Field(discriminator="name")]
