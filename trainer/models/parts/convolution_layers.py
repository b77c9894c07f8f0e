"""Convolutions and poolings that torch lacks: with offsets, self-calibrated, and blurred against
aliasing.
"""

from __future__ import annotations

from math import comb, prod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from trainer.models.edit.layer_kinds import CONVOLUTIONS


class DeformableConv2d(nn.Conv2d):
    """A convolution whose taps move, each by an offset, and are weighed, each by a mask, both told
    by the input.

    One more convolution of the same size, stride and dilation, `offsets`, gives for each of K taps
    a step down and a step right, and m, of which the tap's weight is 2 * sigmoid(m). It starts at
    zero, so that at the start every tap is in its place with weight 1, and the output is the plain
    convolution's. (The paper's weight sigmoid(m) would start at 1/2; the factor of 2 leaves what
    can be learned but for the scale, and needs no scaling of the weights.)

    Source: Zhu et al. 2018, arXiv:1811.11168.
    """

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.num_taps = prod(self.kernel_size)
        self.offsets = nn.Conv2d(
            self.in_channels,
            3 * self.num_taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)

    @classmethod
    def around(cls, conv: nn.Conv2d) -> Self:
        """The deformable convolution with the parameters of a plain one."""
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None,
        )  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        return made.to(conv.weight.device, conv.weight.dtype).train(conv.training)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W'], in float32 also under autocast: positions need
        it.
        """
        wide = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            told = self.offsets(images.to(self.weight.dtype)).to(wide)
            steps, masks = told.split((2 * self.num_taps, self.num_taps), dim=1)
            bias = None if self.bias is None else self.bias.to(wide)
            made = deform_conv2d(
                images.to(wide), steps, self.weight.to(wide), bias, self.stride, self.padding,
                self.dilation, 2 * masks.sigmoid(),
            )  # fmt: skip
        return made.to(images.dtype)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _deformable_flops(images, weight, *rest, out_shape=None, **options) -> int:
    """As a plain convolution's: where a tap stands changes no count of multiply-adds."""
    return 2 * prod(out_shape) * prod(weight[1:])


@CONVOLUTIONS.register
class SelfCalibratedConv2d(nn.Module):
    """A 3x3 convolution of which one half of the channels is gated by a wider look at itself.

    The first half of the channels goes through a plain 3x3 convolution. Of the second half x, with
    3x3 convolutions F2, F3 (each with its norm) and F4: F4(F3(x) * sigmoid(x + up(F2(pool(x))))),
    where pool averages over windows of `pooling` and up repeats its pixels. The two are put side by
    side; the norm behind stays the model's own.

    groups: of the replaced convolution; each half has half as many, where there is more than one.

    Source: Liu et al. 2020, CVPR, "Improving Convolutional Networks with Self-Calibrated
    Convolutions".
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride, dilation, groups: int, pooling: int
    ):
        super().__init__()
        inner, outer = in_channels // 2, out_channels // 2
        options: dict = {
            "padding": dilation,
            "dilation": dilation,
            "groups": max(1, groups // 2),
            "bias": False,
        }
        self.pool = nn.AvgPool2d(pooling)
        self.plain = nn.Conv2d(inner, outer, 3, stride=stride, **options)
        self.context = nn.Conv2d(inner, inner, 3, **options)
        self.context_norm = nn.BatchNorm2d(inner)
        self.content = nn.Conv2d(inner, inner, 3, **options)
        self.content_norm = nn.BatchNorm2d(inner)
        self.gated = nn.Conv2d(inner, outer, 3, stride=stride, **options)
        for conv in (self.plain, self.context, self.content, self.gated):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W], H and W at least `pooling`, to [B, C', H', W']."""
        first, second = images.chunk(2, dim=1)
        context = self.context_norm(self.context(self.pool(second)))
        gate = torch.sigmoid(second + functional.interpolate(context, size=second.shape[2:]))
        return torch.cat(
            (self.plain(first), self.gated(self.content_norm(self.content(second)) * gate)), dim=1
        )


@CONVOLUTIONS.register
class Blur(nn.Module):
    """A binomial low-pass filter [1, 2, 1] / 4 across and down (here for filter_px 3), taken at
    every stride-th pixel.

    A side of H pixels becomes ceil(H / stride). Odd filters at stride 2 are timm's BlurPool2d.
    Nothing is learned.

    Source: Zhang 2019, arXiv:1904.11486.
    """

    def __init__(self, filter_px: int, stride: int | tuple[int, int], padding: str):
        super().__init__()
        self.stride = stride
        self.mode = {"reflect": "reflect", "zeros": "constant"}[padding]
        self.sides = ((filter_px - 1) // 2, filter_px // 2) * 2
        row = torch.tensor([comb(filter_px - 1, place) for place in range(filter_px)]) / 2 ** (
            filter_px - 1
        )
        self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H', W']."""
        channels = images.shape[1]
        kernel = self.kernel.to(images.dtype).expand(channels, 1, -1, -1)
        wide = functional.pad(images, self.sides, self.mode)
        return functional.conv2d(wide, kernel, stride=self.stride, groups=channels)

    def extra_repr(self) -> str:
        return f"{len(self.kernel)}, stride={self.stride}, padding={self.mode}"


@CONVOLUTIONS.register
class BlurConv2d(nn.Module):
    """A strided convolution with the blur before it, or one of stride 1 with the strided blur
    behind it.
    """

    def __init__(self, conv: nn.Conv2d, filter_px: int, padding: str, is_before: bool):
        super().__init__()
        self.is_before = is_before
        self.blur = Blur(filter_px, 1 if is_before else conv.stride, padding)
        self.conv = conv
        if not is_before:
            conv.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        return self.conv(self.blur(images)) if self.is_before else self.blur(self.conv(images))
