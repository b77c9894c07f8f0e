"""The nonlinearity of a model's body."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.base import Positive
from trainer.ingredients.surgery import Part, Swap


class _Activation(Part):
    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class Relu(_Activation):
    name: Literal["relu"] = "relu"


class LeakyRelu(_Activation):
    name: Literal["leaky_relu"] = "leaky_relu"
    example: ClassVar[dict[str, Any]] = {"slope": 0.01}
    slope: Positive


class Gelu(_Activation):
    name: Literal["gelu"] = "gelu"
    approximate: Literal["tanh"] | None = None


class Silu(_Activation):
    name: Literal["silu"] = "silu"


class Swish(_Activation):
    name: Literal["swish"] = "swish"
    example: ClassVar[dict[str, Any]] = {"beta": 1.0}
    beta: Positive


class Mish(_Activation):
    name: Literal["mish"] = "mish"


class HardSwish(_Activation):
    name: Literal["hard_swish"] = "hard_swish"


class Elu(_Activation):
    name: Literal["elu"] = "elu"
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0}
    alpha: Positive


class Prelu(_Activation):
    name: Literal["prelu"] = "prelu"
    example: ClassVar[dict[str, Any]] = {"slope": 0.25}
    slope: Positive


Activation = Annotated[
    Relu | LeakyRelu | Gelu | Silu | Swish | Mish | HardSwish | Elu | Prelu, Field(discriminator="name")
]
