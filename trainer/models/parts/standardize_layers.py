"""Convolutions whose weights are standardized each time they are used; the optimizer sees the raw
ones.

A filter's statistics are those of a row of layer normalization, so its one fused pass does the
work: on a CPU it costs less than timm's way through batch normalization, and a fraction of separate
passes for mean and variance.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Keeps a filter of equal weights from 0 / 0 where eps stands outside the root. float32 still holds
# it and, which the gradient needs, the third power of its inverse root; beside eps squared it is
# nothing.
_TINY = 1e-24


class StandardizedConv2d(nn.Conv2d):
    """A convolution that uses (w - mean) / std in place of its weights w, over each output
    channel's filter.

    With the mean and the variance v over a filter's n = in_channels / groups * height * width
    weights, v divided by n (biased) or by n - 1 (unbiased), the std is sqrt(v + eps) with eps
    inside the root and sqrt(v) + eps outside. Both are computed in float32 where the weights are
    half precision. Parameters are Conv2d's: weight, bias.

    Sources: Qiao et al. 2019, arXiv:1903.10520; Kolesnikov et al. 2020, arXiv:1912.11370 (biased,
    inside).
    """

    def __init__(self, *shape, is_unbiased: bool, eps: float, is_inside: bool, **options):
        super().__init__(*shape, **options)
        self.is_unbiased = is_unbiased
        self.eps = eps
        self.is_inside = is_inside

    @classmethod
    def around(cls, conv: nn.Conv2d, **form) -> Self:
        """The standardized convolution with the parameters of a plain one; no weight is drawn."""
        return _taking(cls, conv, form)

    def standardized_weight(self) -> Tensor:
        """What the convolution uses: as the weight in shape, dtype and memory format."""
        num_weights = self.weight[0].numel()
        ratio = (
            (num_weights - 1) / num_weights if self.is_unbiased else 1.0
        )  # biased variance / asked variance
        rows = _rows(self.weight)
        if self.is_inside:
            return _like(_normalized(rows, self.eps * ratio, ratio**0.5), self.weight)
        return _like(_EpsOutside.apply(rows, ratio**-0.5, self.eps), self.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        return self._conv_forward(images, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        variance, place = (
            "unbiased" if self.is_unbiased else "biased",
            "inside" if self.is_inside else "outside",
        )
        return f"{super().extra_repr()}, {variance}, eps={self.eps} {place}"


class ScaledStandardizedConv2d(nn.Conv2d):
    """A convolution that uses gain * gamma * (w - mean) / sqrt((v + eps) * n) in place of its
    weights w.

    With n = in_channels / groups * height * width weights in a filter and their biased variance v,
    a filter's squares sum to gamma**2 * gain**2. gain [C'] is learned, from 1; being
    one-dimensional, it decays as norms and biases do. eps stands as in timm: the paper's own code
    takes the larger of v * n and eps instead.

    Sources: Brock et al. 2021, arXiv:2101.08692; timm's ScaledStdConv2d.
    """

    def __init__(self, *shape, gamma: float, eps: float, **options):
        super().__init__(*shape, **options)
        self.gamma = gamma
        self.eps = eps
        self.gain = nn.Parameter(
            torch.ones(self.out_channels, dtype=self.weight.dtype, device=self.weight.device)
        )

    @classmethod
    def around(cls, conv: nn.Conv2d, **form) -> Self:
        """The standardized convolution with the parameters of a plain one, and a gain of 1; no
        weight is drawn.
        """
        standardized = _taking(cls, conv, form)
        standardized.gain = nn.Parameter(torch.ones_like(conv.weight[:, 0, 0, 0]))
        return standardized

    def standardized_weight(self) -> Tensor:
        """What the convolution uses: as the weight in shape, dtype and memory format."""
        rows = _rows(self.weight)
        scaled = _normalized(rows, self.eps, self.gamma * rows.shape[1] ** -0.5)
        return _like(scaled * self.gain[:, None], self.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        return self._conv_forward(images, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, eps={self.eps}"


class _EpsOutside(torch.autograd.Function):
    """(row - mean) / (widening * s + eps), where s is the biased std of a row; once differentiable.

    It is f(s) = s / (widening * s + eps) times layer normalization, whose s comes for free; through
    autograd the factor would cost four times the passes over the weights. f'(s) / f(s)**2 = eps /
    s**2.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, widening: float, eps: float) -> Tensor:
        made, mean, inverse = torch.ops.aten.native_layer_norm(
            rows, rows.shape[1:], None, None, _TINY
        )
        factor = 1 / (widening + eps * inverse)
        made.mul_(factor)
        ctx.save_for_backward(rows, mean, inverse, made)
        ctx.widening, ctx.eps = widening, eps
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, inverse, made = ctx.saved_tensors
        shape, wanted = rows.shape[1:], [True, False, False]
        through = torch.ops.aten.native_layer_norm_backward(
            grad, rows, shape, mean, inverse, None, None, wanted
        )[0]
        along = (grad * made).mean(dim=1, keepdim=True) * inverse * (ctx.eps * inverse)
        return (
            through.mul_(1 / (ctx.widening + ctx.eps * inverse)).addcmul_(made, along),
            None,
            None,
        )


def _taking(kind: type, conv: nn.Conv2d, form: dict) -> nn.Module:
    made = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride,
        padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        bias=conv.bias is not None, padding_mode=conv.padding_mode, device="meta", **form,
    )  # fmt: skip
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


def _rows(weight: Tensor) -> Tensor:
    """[C', n], float32 at least, without a copy in either memory format: a filter's statistics know
    no order.
    """
    wide = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    return wide.flatten(1) if wide.is_contiguous() else wide.permute(0, 2, 3, 1).flatten(1)


def _like(rows: Tensor, weight: Tensor) -> Tensor:
    """The rows in the shape, dtype and memory format of the weight they came from."""
    if weight.is_contiguous():
        return rows.view(weight.shape).to(weight.dtype)
    channels, inner, height, width = weight.shape
    return rows.view(channels, height, width, inner).permute(0, 3, 1, 2).to(weight.dtype)


def _normalized(rows: Tensor, eps: float, scale: float) -> Tensor:
    """scale * (row - mean) / sqrt(biased variance + eps); the scale rides along as layer
    normalization's gamma.
    """
    gamma = None if scale == 1 else rows.new_full(rows.shape[1:], scale)
    return functional.layer_norm(rows, rows.shape[1:], gamma, None, eps)
