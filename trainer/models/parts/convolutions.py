"""Other kinds of 3x3 convolutions: deformable, self-calibrated, dilated."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from trainer.models.edit.layer_kinds import CONVOLUTIONS
from trainer.models.edit.replacement import (
    ConvLocation,
    Part,
    Replacement,
    ReplacementError,
    counted,
    find_layers,
    inside_attention,
    nothing_to_replace,
    replace_module,
)
from trainer.models.edit.stages import blocks, stages
from trainer.models.parts.blur import stride_of

Stages = Annotated[int, Field(ge=1, le=4)]


class Convolution(Part):
    """stages: how many last stages it applies to."""

    kind: ClassVar[str] = "convolution"
    stages: Stages

    def _last_stages(self, model: nn.Module) -> list[str]:
        names = stages(model)
        if self.stages > len(names):
            raise ReplacementError(
                f"model.convolution.stages={self.stages}: {type(model).__name__} has {len(names)} "
                f"stages; use {len(names)} or fewer"
            )
        return names[-self.stages :]


class _ConvolutionReplacement(Convolution):
    """Replaces 3x3 convolutions one by one."""

    wanted: ClassVar[str]

    @abstractmethod
    def replacement_for(self, conv: nn.Conv2d) -> nn.Module:
        """The replacement of one convolution."""

    @abstractmethod
    def applies_to(
        self, model: nn.Module, name: str, convolutions: dict[str, ConvLocation]
    ) -> bool:
        """Is this 3x3 convolution replaced?"""

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace them in the last stages."""
        convolutions = {place.name: place for place in find_layers(model).convolutions}
        last = tuple(f"{stage}." for stage in self._last_stages(model))
        of_3x3 = [
            name
            for name, place in convolutions.items()
            if name.startswith(last)
            and type(place.module) is nn.Conv2d
            and place.module.kernel_size == (3, 3)
        ]
        names = tuple(name for name in of_3x3 if self.applies_to(model, name, convolutions))
        if not names:
            raise nothing_to_replace(
                "convolution", f"{self.wanted} in its last {self.stages} stages", model
            )
        before = [convolutions[name].module for name in names]
        after = [self.replacement_for(conv).train(conv.training) for conv in before]
        for name, module in zip(names, after, strict=True):
            replace_module(model, name, module)
        left = len(of_3x3) - len(names)
        note = f"kept: {left} of 3x3 that are not a {self.wanted}" if left else ""
        return Replacement("convolution", counted(before), type(after[0]).__name__, names, note)


class Deformable(_ConvolutionReplacement):
    """3x3 convolutions with input-dependent sampling offsets and weights (DCNv2).

    Offsets and masks come from one more 3x3 convolution that starts at zero; a mask is 2 * sigmoid,
    so the model starts as the plain one. (The paper's code gives the offsets a tenth of the
    learning rate; here all have the same.)

    stages: how many last stages; the paper takes three (conv3 to conv5).

    Raises ReplacementError where they have no 3x3 convolution.
    Source: Zhu et al. 2018, arXiv:1811.11168 (version 2).
    """

    name: Literal["deformable"] = "deformable"
    example: ClassVar[dict[str, Any]] = {"stages": 1}
    wanted: ClassVar[str] = "3x3 convolution"

    def applies_to(
        self, model: nn.Module, name: str, convolutions: dict[str, ConvLocation]
    ) -> bool:
        return True

    def replacement_for(self, conv: nn.Conv2d) -> nn.Module:
        return DeformableConv2d.around(conv)


class SelfCalibrated(_ConvolutionReplacement):
    """The 3x3 convolution of a bottleneck, half of whose channels are gated by their own wider
    context (SCNet).

    Only between two 1x1 convolutions, as in the paper: without them, as in a basic block, the two
    halves of the channels would never mix. New weights are initialized as in timm's ResNet.

    stages: how many last stages; the paper takes all four.
    pooling: the pooling window of the wider context; a feature map must be at least that large.

    Raises ReplacementError where they have no such convolution.
    Source: Liu et al. 2020, CVPR, "Improving Convolutional Networks with Self-Calibrated
    Convolutions".
    """

    name: Literal["self_calibrated"] = "self_calibrated"
    example: ClassVar[dict[str, Any]] = {"stages": 4, "pooling": 4}
    wanted: ClassVar[str] = "3x3 convolution between two of 1x1"
    pooling: Annotated[int, Field(ge=2, le=16)]

    def applies_to(
        self, model: nn.Module, name: str, convolutions: dict[str, ConvLocation]
    ) -> bool:
        """Is it alone between two 1x1 convolutions of a block, with channels that can be halved?"""
        conv = convolutions[name].module
        block = next(
            (each for stage in blocks(model) for each in stage if name.startswith(f"{each}.")), None
        )
        inside = [each for each in convolutions if block and each.startswith(f"{block}.")]
        at = inside.index(name) if inside else 0
        around = inside[max(0, at - 1) : at] + inside[at + 1 : at + 2]
        is_between = [convolutions[each].module.kernel_size for each in around] == [(1, 1), (1, 1)]
        above = model.get_submodule(name.rpartition(".")[0])
        is_alone = (
            name.rpartition(".")[0] == block
            or sum(isinstance(each, nn.Conv2d) for each in above.modules()) == 1
        )
        halves = (
            conv.in_channels % 2 == 0
            and conv.out_channels % 2 == 0
            and (conv.groups == 1 or conv.groups % 2 == 0)
        )
        return (
            is_between
            and is_alone
            and halves
            and conv.groups < conv.in_channels
            and conv.bias is None
        )

    def replacement_for(self, conv: nn.Conv2d) -> nn.Module:
        return SelfCalibratedConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.stride,
            conv.dilation,
            conv.groups,
            self.pooling,
        )


class Dilated(Convolution):
    """The last stages keep the resolution of the stage before them; their convolutions are dilated
    by 2, 4, … instead.

    A stage's stride of 2 becomes 1, and its convolutions larger than 1x1 get twice the dilation of
    the stage before; those that were strided keep that of the stage before. The same as timm's
    output_stride 16 (1 stage) and 8 (2 stages).

    stages: how many last stages; each must have a stride.

    Raises ReplacementError where one has none, or has it inside attention.
    Source: Yu and Koltun 2017, arXiv:1705.09914; Chen et al. 2017, arXiv:1706.05587 (output
    stride).
    """

    name: Literal["dilated"] = "dilated"
    example: ClassVar[dict[str, Any]] = {"stages": 1}

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Remove the strides, and dilate."""
        convolutions = {place.name for place in find_layers(model).convolutions}
        in_attention = inside_attention(model)
        before, places, notes, dilation = [], [], [], 1
        for stage in self._last_stages(model):
            inner = {
                name: each for name, each in model.named_modules() if name.startswith(f"{stage}.")
            }
            strides = {
                name: stride_of(module) for name, module in inner.items() if stride_of(module) > 1
            }
            if not strides or not in_attention.isdisjoint(strides):
                found = "has its stride inside attention" if strides else "has no stride"
                raise ReplacementError(
                    f"model.convolution: {stage} {found}; use fewer stages, "
                    "or leave model.convolution out"
                )
            wider = dilation * max(strides.values())
            for name, module in inner.items():
                wide = (
                    name in convolutions
                    and isinstance(module, nn.Conv2d)
                    and max(module.kernel_size) > 1
                )
                if name in strides or wide:
                    before.append(module)
                    places.append(name)
                    _dilate(model, name, dilation if name in strides else wider)
            dilation = wider
            notes.append(f"{stage} by {dilation}")
        return Replacement(
            "convolution",
            counted(before),
            "the same, dilated at stride 1",
            tuple(places),
            ", ".join(notes),
        )


def _dilate(model: nn.Module, name: str, dilation: int) -> None:
    """Stride 1, and the dilation; even kernels are padded by one more pixel at the end, so that the
    map keeps its size.
    """
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        module.stride = (1, 1)
        if any(side % 2 == 0 for side in module.kernel_size):
            replace_module(model, name, _same(module, dilation))
        elif max(module.kernel_size) > 1:
            if not isinstance(module.padding, str):  # "same" stays so
                module.padding = tuple(dilation * side for side in module.padding)
            module.dilation = tuple(dilation * side for side in module.dilation)
    elif isinstance(module, nn.AvgPool2d) and module.kernel_size in (2, (2, 2)):
        replace_module(
            model,
            name,
            AvgPool2dSame(
                2, 1, ceil_mode=module.ceil_mode, count_include_pad=module.count_include_pad
            ),
        )
    else:
        pool: Any = module  # of stride_of's kinds
        pool.stride = 1


def _same(conv: nn.Conv2d, dilation: int) -> nn.Conv2d:
    kernel: Any = conv.kernel_size  # torch declares it as of any length
    made = Conv2dSame(
        conv.in_channels, conv.out_channels, kernel, dilation=dilation,
        groups=conv.groups, bias=conv.bias is not None, device="meta",
    )  # fmt: skip
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


class DeformableConv2d(nn.Conv2d):
    """A convolution whose taps are shifted by offsets and scaled by masks, both computed from the
    input.

    One more convolution of the same size, stride and dilation, `offsets`, gives for each of K taps
    an offset down, an offset right, and m; the tap's mask is 2 * sigmoid(m). It starts at zero, so
    at the start every tap is in its place with mask 1, and the output is the plain convolution's.
    (The paper's mask sigmoid(m) would start at 1/2; the factor of 2 changes only the scale, and
    loaded weights need no rescaling.)

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
        """[B, C, H, W] to [B, C', H', W'], in float32 even under autocast: positions need it."""
        wide = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            predicted = self.offsets(images.to(self.weight.dtype)).to(wide)
            shifts, masks = predicted.split((2 * self.num_taps, self.num_taps), dim=1)
            bias = None if self.bias is None else self.bias.to(wide)
            made = deform_conv2d(
                images.to(wide), shifts, self.weight.to(wide), bias, self.stride, self.padding,
                self.dilation, 2 * masks.sigmoid(),
            )  # fmt: skip
        return made.to(images.dtype)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _deformable_flops(images, weight, *rest, out_shape=None, **options) -> int:
    """As of a plain convolution: offsets do not change the number of multiply-adds."""
    return 2 * prod(out_shape) * prod(weight[1:])


@CONVOLUTIONS.register
class SelfCalibratedConv2d(nn.Module):
    """A 3x3 convolution, half of whose channels are gated by their own wider context.

    The first half of the channels goes through a plain 3x3 convolution. Of the second half x, with
    3x3 convolutions F2, F3 (each with its norm) and F4: F4(F3(x) * sigmoid(x + up(F2(pool(x))))),
    where pool is average pooling with window `pooling` and up is nearest upsampling. The two halves
    are concatenated; the norm after it stays the model's own.

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
