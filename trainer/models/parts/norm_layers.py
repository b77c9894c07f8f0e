"""Normalization layers that neither torch nor timm has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.edit.layer_kinds import NORMS


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization by the statistics of virtual batches.

    images: per virtual batch, in their order. Where they do not divide the micro-batch, the last
    virtual batch is smaller; a single last image joins the virtual batch before it. A micro-batch
    of fewer images is one virtual batch. The running statistics are updated once by `momentum`,
    towards the plain mean over the virtual batches.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_channels: int, images: int, eps: float, momentum: float) -> None:
        super().__init__(num_channels, eps=eps, momentum=momentum)
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W]: by virtual batches in training, by the running statistics in evaluation."""
        if not self.training:
            return super().forward(x)
        made, means, variances = [], [], []
        for part in x.split(self._sizes(len(x))):
            # With momentum 1 these become the statistics of the virtual batch itself.
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            made.append(
                F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            self.running_mean.lerp_(torch.stack(means).mean(0), self.momentum)
            self.running_var.lerp_(torch.stack(variances).mean(0), self.momentum)
            self.num_batches_tracked.add_(1)
        return torch.cat(made)

    def sample_note(self, num_images: int) -> str:
        """How a micro-batch is split into samples of the statistics."""
        return f"virtual batches of {self.images} out of the {num_images}"

    def _sizes(self, num_images: int) -> list[int]:
        full, rest = divmod(num_images, self.images)
        sizes = [self.images] * full
        if rest == 1 and full:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, images={self.images}"


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with a layer of its own for each split of a micro-batch.

    The images come split after split, as many of each. The first split goes through this layer,
    the others through those of aux_bn: statistics, gamma and beta are each one's own. Evaluation is
    by the first alone.
    """

    def __init__(self, num_channels: int, splits: int, eps: float, momentum: float) -> None:
        super().__init__(num_channels, eps=eps, momentum=momentum)
        self.aux_bn = nn.ModuleList(
            nn.BatchNorm2d(num_channels, eps=eps, momentum=momentum) for _ in range(splits - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[splits * B, C, H, W] in training, [B, C, H, W] in evaluation."""
        if not self.training:
            return super().forward(x)
        first, *others = x.unflatten(0, (1 + len(self.aux_bn), -1))
        made = [super().forward(first)]
        made += [norm(split) for norm, split in zip(self.aux_bn, others, strict=True)]
        return torch.cat(made)

    def sample_note(self, num_images: int) -> str:
        """How a micro-batch is split into samples of the statistics."""
        return f"each of {1 + len(self.aux_bn)} splits of the {num_images}"


class StepNorm(nn.Module, ABC):
    """A norm whose running statistics are updated once per optimizer step, from what all its
    micro-batches have accumulated.

    It does not normalize by the micro-batch, so how a step is split makes no difference. is_adding:
    False while a forward pass is recomputed (activation checkpointing), which must not count twice.
    """

    is_adding = True

    @abstractmethod
    def start_step(self) -> None:
        """Discard what has been accumulated since the last step."""

    @abstractmethod
    def finish_step(self) -> None:
        """Update the statistics from what a step's micro-batches have accumulated, if anything."""

    @abstractmethod
    def added(self) -> Tensor:
        """What has been accumulated since the last step: [N], which ranks sum."""

    @abstractmethod
    def set_added(self, added: Tensor) -> None:
        """Replace what this rank has accumulated by the sum over ranks."""


@NORMS.register
class EstimatedBatchNorm2d(StepNorm):
    """Batch normalization by running estimates, in training as in evaluation; no gradient flows
    through the estimates.

    All micro-batches of an optimizer step are normalized by the estimates from before the step.
    Each accumulates its sums, and `finish_step` updates both estimates once, by `momentum`, towards
    the mean over all values of the step and towards their mean squared distance from the estimated
    mean: as it was before, or, with is_around_moved, as just updated. So it makes no difference how
    a step is split into micro-batches. The sums are not part of the state_dict: they are empty
    between steps.

    The estimates start at mean 0 and variance 1: the first steps see the affine part alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_channels: int, eps: float, momentum: float, is_around_moved: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.is_around_moved = eps, momentum, is_around_moved
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.start_step()

    def start_step(self) -> None:
        # [2 C + 1]: sums of distances from the estimated mean, of their squares, and the number of
        # values, which a device would be waited for elsewhere
        self._sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.is_adding:
            self._add(x.detach())
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @torch.no_grad()
    def _add(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x.to(self.running_mean.dtype), (0, 2, 3), correction=0)
        # Around the estimate, not zero: the square of a large mean would cancel the variance.
        shift = mean - self.running_mean
        sums = torch.cat([shift, variance + shift.square(), shift.new_ones(1)])
        sums *= x.numel() // x.shape[1]
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def finish_step(self) -> None:
        if self._sums is None:
            return
        shift, square = (self._sums[:-1] / self._sums[-1]).view(2, -1)
        rate = self.momentum
        # The mean of (x - m)^2 or of (x - m - rate * shift)^2, with m the estimate from before and
        # shift the mean of x - m.
        variance = square
        if self.is_around_moved:
            variance = square - (2 * rate - rate**2) * shift.square()
        self.running_mean.add_(shift, alpha=rate)
        self.running_var.lerp_(variance, rate)
        self.start_step()

    def added(self) -> Tensor:
        if self._sums is None:
            return self.running_mean.new_zeros(2 * len(self.running_mean) + 1)
        return self._sums

    def set_added(self, added: Tensor) -> None:
        self._sums = added

    def extra_repr(self) -> str:
        around = ", around the moved mean" if self.is_around_moved else ""
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}{around}"


@NORMS.register
class BatchChannelNorm2d(nn.Module):
    """Batch normalization, then normalization over groups of channels with one gamma and beta per
    group.

    x [B, C, H, W]: first normalized per channel by `batch`, which has an affine part per channel;
    then, image by image, over the channels and pixels of each of `groups` groups.

    statistics: "batch", those of the micro-batch; "estimated", see EstimatedBatchNorm2d, which
    is_around_moved is for.
    weight, bias: [groups], of the second normalization: the outermost.
    """

    group_norm: ClassVar[Callable[..., Tensor]] = staticmethod(F.group_norm)

    def __init__(
        self,
        num_channels: int,
        groups: int,
        eps: float,
        momentum: float,
        statistics: str,
        is_around_moved: bool = False,
    ) -> None:
        super().__init__()
        assert num_channels % groups == 0, (num_channels, groups)
        self.batch: nn.Module = (
            nn.BatchNorm2d(num_channels, eps=eps, momentum=momentum)
            if statistics == "batch"
            else EstimatedBatchNorm2d(num_channels, eps, momentum, is_around_moved)
        )
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(groups))
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        num_each = x.shape[1] // self.groups
        weight, bias = (
            each[:, None].expand(-1, num_each).reshape(-1) for each in (self.weight, self.bias)
        )
        return self.group_norm(self.batch(x), self.groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}"
