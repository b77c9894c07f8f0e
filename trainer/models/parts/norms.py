"""The norms that can replace those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import timm.layers
from pydantic import Field, model_validator
from torch import nn

from trainer.base.errors import PlanError
from trainer.models.edit.norm_placement import GroupedNormPart, NormPart
from trainer.models.edit.replacement import NormLocation, ReplacementError
from trainer.models.parts.norm_layers import (
    BatchChannelNorm2d,
    GhostBatchNorm2d,
    SplitBatchNorm2d,
)

Epsilon = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(gt=0, le=1)]
Groups = Annotated[int, Field(ge=1, le=4096)]


class BatchNorm(NormPart):
    """Each channel by the statistics of the micro-batch; running ones in evaluation.

    momentum: the step size of the running statistics, per optimizer step. affine: with gamma and
    beta.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    name: Literal["batch_norm"] = "batch_norm"
    example: ClassVar[dict[str, Any]] = {"momentum": 0.1, "eps": 1e-5, "affine": True}
    momentum: Momentum
    eps: Epsilon
    affine: bool

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return nn.BatchNorm2d(
            num_channels, eps=self.eps, momentum=self.momentum, affine=self.affine
        )

    @property
    def has_gamma(self) -> bool:
        return self.affine


class GhostBatchNorm(NormPart):
    """BatchNorm by the statistics of virtual batches, smaller than the micro-batch. See
    GhostBatchNorm2d.

    images: per virtual batch. momentum, eps: as in BatchNorm.

    Source: Hoffer, Hubara and Soudry 2017, arXiv:1705.08741.
    """

    name: Literal["ghost_batch_norm"] = "ghost_batch_norm"
    example: ClassVar[dict[str, Any]] = {"images": 32, "momentum": 0.1, "eps": 1e-5}
    images: Annotated[int, Field(ge=2)]
    momentum: Momentum
    eps: Epsilon

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return GhostBatchNorm2d(num_channels, self.images, eps=self.eps, momentum=self.momentum)

    def check(self, plan) -> None:
        """Reject a single virtual batch per micro-batch: that is plain BatchNorm."""
        num_images = plan.recipe.batch.norm_images * (plan.recipe.augment_splits or 1)
        if num_images < self.images + 2:  # a single last image joins the virtual batch before it
            smaller = (
                f'set="model.norm.images={num_images // 2}"'
                if num_images >= 4
                else "batch.norm_images of 4 or more"
            )
            raise PlanError(
                f"model.norm.images {self.images}: the {num_images} images of a micro-batch "
                f"(batch.norm_images) would be one virtual batch, which is batch_norm; "
                f"use {smaller}"
            )


class SplitBatchNorm(NormPart):
    """BatchNorm with statistics, gamma and beta of its own for each augmentation split; the first
    split's, of the images that are augmented least, serve in evaluation. See SplitBatchNorm2d.

    splits: as augment_splits. momentum, eps: as in BatchNorm.

    Source: Xie et al. 2019, arXiv:1911.09665 (auxiliary batch norm); timm's --split-bn.
    """

    name: Literal["split_batch_norm"] = "split_batch_norm"
    example: ClassVar[dict[str, Any]] = {"splits": 2, "momentum": 0.1, "eps": 1e-5}
    splits: Annotated[int, Field(ge=2, le=16)]
    momentum: Momentum
    eps: Epsilon

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return SplitBatchNorm2d(num_channels, self.splits, eps=self.eps, momentum=self.momentum)

    def start_at_zero(self, norm: nn.Module) -> None:
        for each in norm.modules():
            if isinstance(each, nn.BatchNorm2d):
                super().start_at_zero(each)

    def check(self, plan) -> None:
        """Reject another number of splits than the images have."""
        found = plan.recipe.augment_splits
        if found != self.splits:
            there = "augment_splits is off" if found is None else f"augment_splits is {found}"
            raise PlanError(
                f"model.norm.splits is {self.splits}, and {there}",
                f"use augment_splits={self.splits}, or model.norm.name=batch_norm"
                if found is None
                else f"use model.norm.splits={found}",
                path=("model", "norm", "splits"),
            )


class GroupNorm(GroupedNormPart):
    """Each image by itself, over the channels and pixels of each group of channels.

    groups, channels_per_group: one of the two.

    Raises ValueError for both, or neither.
    Source: Wu and He 2018, arXiv:1803.08494.
    """

    name: Literal["group_norm"] = "group_norm"
    example: ClassVar[dict[str, Any]] = {"groups": 32, "eps": 1e-5}
    groups: Groups | None = None
    channels_per_group: Groups | None = None
    eps: Epsilon

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.groups is None) == (self.channels_per_group is None):
            raise ValueError("needs either groups or channels_per_group; use one of them")
        return self

    def _division(self) -> tuple[str, int]:
        if self.channels_per_group is None:
            return super()._division()
        return "channels_per_group", self.channels_per_group

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return nn.GroupNorm(self.num_groups(num_channels), num_channels, eps=self.eps)


class LayerNorm2d(NormPart):
    """Each pixel of each image by itself, over its channels, as in ConvNeXt.

    Sources: Ba, Kiros and Hinton 2016, arXiv:1607.06450; Liu et al. 2022, arXiv:2201.03545 (per
    pixel).
    """

    name: Literal["layer_norm_2d"] = "layer_norm_2d"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-6}
    eps: Epsilon

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return timm.layers.LayerNorm2d(num_channels, eps=self.eps)

    def over_channels_last(self, norm: nn.Module) -> nn.Module:
        last = timm.layers.LayerNorm(len(norm.get_parameter("weight")), eps=self.eps)
        last.load_state_dict(norm.state_dict())
        return last


class InstanceNorm(NormPart):
    """Each channel of each image by itself, over its pixels; no running statistics.

    affine: with gamma and beta.

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022.
    """

    name: Literal["instance_norm"] = "instance_norm"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-5, "affine": True}
    eps: Epsilon
    affine: bool

    def num_groups(self, num_channels: int) -> int:
        return num_channels

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return nn.InstanceNorm2d(num_channels, eps=self.eps, affine=self.affine)

    @property
    def has_gamma(self) -> bool:
        return self.affine


class FilterResponseNorm(NormPart):
    """Each channel of each image over its root mean square, then gamma, beta and a learned
    threshold (TLU).

    The threshold replaces the activation after the norm. Where there is none (before an addition,
    in shortcuts), the norm has no threshold. eps is fixed; the paper learns it only for 1x1 maps,
    which are rejected here.

    Source: Singh and Krishnan 2019, arXiv:1911.09737.
    """

    name: Literal["filter_response_norm"] = "filter_response_norm"
    example: ClassVar[dict[str, Any]] = {"eps": 1e-6}
    brings_activation: ClassVar[bool] = True
    eps: Epsilon

    def num_groups(self, num_channels: int) -> int:
        return num_channels

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return timm.layers.FilterResponseNormTlu2d(
            num_channels, apply_act=is_activated, eps=self.eps
        )


class EvoNormS0(GroupedNormPart):
    """x * sigmoid(v x) over the standard deviation of each group of channels of an image, then
    gamma and beta.

    It replaces the activation after the norm, too. Where there is none (before an addition, in
    shortcuts), only gamma and beta remain, as in timm; a model without any activation after a norm,
    such as ConvNeXt, is rejected.

    Source: Liu, Brock, Simonyan and Le 2020, arXiv:2004.02967.
    """

    name: Literal["evo_norm_s0"] = "evo_norm_s0"
    example: ClassVar[dict[str, Any]] = {"groups": 32, "eps": 1e-5}
    brings_activation: ClassVar[bool] = True
    groups: Groups
    eps: Epsilon

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return timm.layers.EvoNorm2dS0(
            num_channels, groups=self.groups, apply_act=is_activated, eps=self.eps
        )

    def _activated(self, model: nn.Module, places: Sequence[NormLocation]) -> set[str]:
        activated = super()._activated(model, places)
        if not activated:
            raise ReplacementError(
                f"model.norm: {self.name} is norm and activation in one, but no norm of "
                f"{type(model).__name__} is directly followed by an activation; "
                "use filter_response_norm, group_norm or a ResNet"
            )
        return activated


class BatchChannelNorm(GroupedNormPart):
    """BatchNorm, then normalization over groups of channels of each image with one gamma and beta
    per group.

    groups: of the second normalization. momentum: the step size of the running statistics, per
    optimizer step. eps: of both. statistics: "batch" normalizes by those of the micro-batch;
    "estimated", for small micro-batches, by running estimates without gradient.
    variance_around_moved_mean: of "estimated": False takes squares around the estimated mean from
    before its update, as the authors' code; True around the updated one, as the paper's algorithm.
    The estimated variance is larger by 2 r - r^2 squared shifts of the mean in the first form, r
    being the momentum.

    The paper updates its estimates with every micro-batch, and normalizes by the updated ones. Here
    they are updated once per optimizer step, at its end, from all its micro-batches: then the
    result does not depend on how a step is split, which is what the estimates are for.

    Source: Qiao, Wang, Liu, Shen and Yuille 2019, arXiv:1903.10520; gamma per group as in the
    authors' code.
    """

    name: Literal["batch_channel_norm"] = "batch_channel_norm"
    example: ClassVar[dict[str, Any]] = {
        "groups": 32,
        "eps": 1e-5,
        "momentum": 0.1,
        "statistics": "batch",
    }
    groups: Groups
    eps: Epsilon
    momentum: Momentum
    statistics: Literal["batch", "estimated"]
    variance_around_moved_mean: bool = False

    @model_validator(mode="after")
    def _moves_a_mean(self) -> Self:
        if self.variance_around_moved_mean and self.statistics == "batch":
            raise ValueError(
                "variance_around_moved_mean is about estimates, and statistics is batch: leave it"
                " out, or write statistics: estimated"
            )
        return self

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return BatchChannelNorm2d(
            num_channels,
            self.groups,
            self.eps,
            self.momentum,
            self.statistics,
            self.variance_around_moved_mean,
        )


class NoNorm(NormPart):
    """No normalization: the feature map as it is, without gamma or beta.

    Convolutions without a bias, because of the norm, get none. A branch whose last gamma started at
    zero starts at full strength.

    Source: none; a baseline for comparing norms.
    """

    name: Literal["no_norm"] = "no_norm"

    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        return nn.Identity()

    @property
    def has_gamma(self) -> bool:
        return False

    def over_channels_last(self, norm: nn.Module) -> nn.Module:
        return norm


Norm = NormPart
