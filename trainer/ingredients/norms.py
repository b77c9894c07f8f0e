"""Which statistics a feature map is normalized by."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.ingredients.base import Positive
from trainer.ingredients.surgery import Part, Swap

Epsilon = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(gt=0, le=1)]
Groups = Annotated[int, Field(ge=1, le=4096)]


class _Norm(Part):
    def apply(self, model: nn.Module, image_px: int) -> Swap:
        raise NotImplementedError


class BatchNorm(_Norm):
    name: Literal["batch_norm"] = "batch_norm"
    example: ClassVar[dict[str, Any]] = {"momentum": 0.1, "eps": 1e-5, "affine": True}
    momentum: Momentum
    eps: Epsilon
    affine: bool


class GhostBatchNorm(_Norm):
    name: Literal["ghost_batch_norm"] = "ghost_batch_norm"
    example: ClassVar[dict[str, Any]] = {"images": 32, "momentum": 0.1, "eps": 1e-5}
    images: Annotated[int, Field(ge=2)]
    momentum: Momentum
    eps: Epsilon


class SyncBatchNorm(_Norm):
    name: Literal["sync_batch_norm"] = "sync_batch_norm"
    example: ClassVar[dict[str, Any]] = {"momentum": 0.1, "eps": 1e-5}
    momentum: Momentum
    eps: Epsilon


class GroupNorm(_Norm):
    name: Literal["group_norm"] = "group_norm"
    example: ClassVar[dict[str, Any]] = {"groups": 32, "eps": 1e-5}
    groups: Groups | None = None
    channels_per_group: Groups | None = None
    eps: Epsilon


class LayerNorm2d(_Norm):
    name: Literal["layer_norm_2d"] = "layer_norm_2d"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-6}
    eps: Epsilon


class InstanceNorm(_Norm):
    name: Literal["instance_norm"] = "instance_norm"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-5, "affine": True}
    eps: Epsilon
    affine: bool


class FilterResponseNorm(_Norm):
    name: Literal["filter_response_norm"] = "filter_response_norm"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-6}
    eps: Epsilon


class EvoNormS0(_Norm):
    name: Literal["evo_norm_s0"] = "evo_norm_s0"
    example: ClassVar[dict[str, Any]] = {"groups": 32, "eps": 1e-5}
    groups: Groups
    eps: Epsilon


class BatchChannelNorm(_Norm):
    name: Literal["batch_channel_norm"] = "batch_channel_norm"
    example: ClassVar[dict[str, Any]] = {"groups": 32, "eps": 1e-5, "momentum": 0.1, "statistics": "batch"}
    groups: Groups
    eps: Epsilon
    momentum: Momentum
    statistics: Literal["batch", "estimated"]


class NoNorm(_Norm):
    name: Literal["no_norm"] = "no_norm"


Norm = Annotated[
    BatchNorm | GhostBatchNorm | SyncBatchNorm | GroupNorm | LayerNorm2d | InstanceNorm | FilterResponseNorm | EvoNormS0
    | BatchChannelNorm | NoNorm,
    Field(discriminator="name"),
]  # fmt: skip
