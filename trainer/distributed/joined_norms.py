"""BatchNorm by the statistics of a sample that several ranks share: each has some of its images.

The same numbers as one process with the whole sample, gradients included, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.distributed.communicator import Ranks
from trainer.models.edit.layer_kinds import AnyBatchNorm, can_join


class JoinedNorms:
    """The BatchNorms of a model, which `over` lets take their statistics over several ranks.

    ranks: those that share a sample, this one among them.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._ranks, self._is_on = ranks, False
        if ranks.is_alone:
            return
        for module in model.modules():
            if can_join(module):
                joined = partial(self._forward, module, module.forward)
                module.forward = joined  # type: ignore[method-assign]  # of this one instance

    @contextmanager
    def over(self) -> Iterator[None]:
        """A block in which training passes go over parts of a sample."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def _forward(self, norm: AnyBatchNorm, plain, x: Tensor) -> Tensor:
        return self._joined(norm, x) if self._is_on and norm.training else plain(x)

    @torch.compiler.disable  # a graph of torch.compile ends where ranks wait for one another
    def _joined(self, norm: AnyBatchNorm, x: Tensor) -> Tensor:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = norm.momentum
        if momentum is None:  # torch's cumulative average
            momentum = 1 / float(norm.num_batches_tracked)
        made = _BatchNorm.apply(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum, norm.eps,
            self._ranks,
        )  # fmt: skip
        if isinstance(norm, timm.layers.BatchNormAct2d):
            made = norm.act(norm.drop(made))
        return made


class _BatchNorm(torch.autograd.Function):
    """x [B, C, ...] by mean and variance over all ranks' B and places; weight and bias [C] or
    None.

    Ranks exchange [2 C + 1] numbers in the forward and [2 C] in the backward pass. On a GPU the
    sums are by torch's kernels for SyncBatchNorm, whose Python waits for the device.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, ranks):
        x = x.contiguous(memory_format=_format_of(x))
        number = x.numel() // x.shape[1]
        if x.is_cuda:
            found = torch.batch_norm_stats(x, eps)  # mean, 1 / deviation
        else:
            found = torch.var_mean(x.to(running_mean.dtype), _places(x), correction=0)[::-1]
        count = torch.full_like(found[0][:1], number)
        means, spreads, counts = ranks.gather(torch.cat([*found, count])).split(x.shape[1], dim=1)
        if x.is_cuda:
            mean, scale = torch.batch_norm_gather_stats_with_counts(
                x, means, spreads, running_mean, running_var, momentum, eps, counts.flatten()
            )
            made = torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)
        else:
            total = counts.sum()
            mean = (means * counts).sum(0) / total
            variance = ((spreads + (means - mean).square()) * counts).sum(0) / total
            scale = (variance + eps).rsqrt()
            made = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (total / (total - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, scale, counts)
        ctx.ranks = ranks
        return made

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, scale, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_format_of(x))
        if x.is_cuda:
            of_grad, of_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
                grad, x, mean, scale, weight, True, weight is not None, weight is not None
            )
        else:
            distance = (x - mean.view(_shape(x))) * scale.view(_shape(x))
            grad_bias, grad_weight = grad.sum(_places(x)), (grad * distance).sum(_places(x))
            of_grad, of_product = grad_bias, grad_weight
        sums = torch.cat([of_grad, of_product])
        ctx.ranks.sum(sums)
        of_grad, of_product = sums.split(x.shape[1])
        if x.is_cuda:
            made = torch.batch_norm_backward_elemt(
                grad, x, mean, scale, weight, of_grad, of_product, counts.to(torch.int32)
            )
        else:
            total, factor = counts.sum(), scale if weight is None else scale * weight
            of_grad, of_product, factor = (
                each.view(_shape(x)) for each in (of_grad / total, of_product / total, factor)
            )
            made = ((grad - of_grad - distance * of_product) * factor).to(x.dtype)
        if weight is None:
            grad_weight = grad_bias = None
        return made, grad_weight, grad_bias, None, None, None, None, None


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _places(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _shape(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.ndim - 2)]
