"""The blocks and stages that a rebuilt body is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models.resnet import Bottleneck, downsample_avg, downsample_conv
from torch import Tensor, nn

# He et al. 2015 and Liu et al. 2022 alike: the wide end of a block is four times the narrow one
_EXPANSION = 4
_LAYER_NORM_EPS = 1e-6  # behind the pooling: Liu et al. 2022, in their code

BlockKind = Literal["bottleneck", "depthwise", "inverted", "inverted_moved_up"]
HowMany = Literal["all", "one"]


class _Shape(NamedTuple):
    in_channels: int
    out_channels: int
    kernel_px: int = 1
    stride: int = 1
    groups: int = 1


@dataclass(frozen=True)
class BlockForm:
    """What all blocks of a body have in common.

    kind, kernel_px, activations, norms: as StagedBody's. norm, activation: classes, made with the
    number of channels and with nothing. pools_shortcuts: a strided shortcut averages its pixels
    before its 1x1 convolution.
    """

    kind: BlockKind
    kernel_px: int
    activations: HowMany
    norms: HowMany
    norm: type[nn.Module]
    activation: type[nn.Module]
    pools_shortcuts: bool

    def out_channels(self, width: int) -> int:
        """The channels behind a block: the width itself, or, of a block that is narrow in its
        middle, four times it.
        """
        return width * (_EXPANSION if self.kind in ("bottleneck", "depthwise") else 1)

    @property
    def spatial(self) -> int:
        """Which of the three convolutions, from 1, sees the neighbourhood."""
        return 1 if self.kind == "inverted_moved_up" else 2

    def shapes(self, in_channels: int, width: int, stride: int) -> tuple[_Shape, _Shape, _Shape]:
        """The three convolutions of a block, as they follow each other."""
        out, kernel_px = self.out_channels(width), self.kernel_px
        if self.kind == "inverted_moved_up":
            spatial = _Shape(in_channels, in_channels, kernel_px, stride, in_channels)
            return spatial, _Shape(in_channels, _EXPANSION * width), _Shape(_EXPANSION * width, out)
        middle = _EXPANSION * width if self.kind == "inverted" else width
        groups = 1 if self.kind == "bottleneck" else middle
        return (
            _Shape(in_channels, middle),
            _Shape(middle, middle, kernel_px, stride, groups),
            _Shape(middle, out),
        )


class StagedBlock(Bottleneck):
    """A residual block of three convolutions in one of four orders, on feature maps [B, C, H, W].

    The forward pass and the names of the layers are those of timm's Bottleneck; what a block does
    without is an identity there. Where all norms are there, no convolution has a bias; where one
    is, every one has: ConvNeXt's way.
    """

    def __init__(
        self, form: BlockForm, in_channels: int, width: int, stride: int, drop_path: float
    ):
        nn.Module.__init__(self)
        out_channels, has_bias = form.out_channels(width), form.norms == "one"
        for number, shape in enumerate(form.shapes(in_channels, width, stride), start=1):
            has_norm = form.norms == "all" or number == form.spatial
            has_activation = form.activations == "all" or number == 2
            self.add_module(f"conv{number}", _convolution(shape, has_bias))
            self.add_module(
                f"bn{number}", form.norm(shape.out_channels) if has_norm else nn.Identity()
            )
            self.add_module(
                f"act{number}", form.activation(inplace=True) if has_activation else nn.Identity()
            )
        self.drop_block, self.aa, self.se = nn.Identity(), nn.Identity(), None
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = downsample_avg if form.pools_shortcuts else downsample_conv
            self.downsample = shortcut(
                in_channels, out_channels, kernel_size=1, stride=stride, norm_layer=form.norm
            )
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.stride, self.dilation = stride, 1


class Stage(nn.Sequential):
    """Blocks, with a layer of its own before them that halves the sides."""


class NormedPool(SelectAdaptivePool2d):
    """Global pooling to [B, C], with a layer norm over C behind it."""

    def __init__(self, pool_type: str, num_channels: int):
        super().__init__(pool_type=pool_type, flatten=True)
        self.norm = nn.LayerNorm(num_channels * self.feat_mult(), eps=_LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def make_stages(
    form: BlockForm,
    stem_channels: int,
    depths: Sequence[int],
    widths: Sequence[int],
    is_separate: bool,
    drop_path: float,
) -> list[nn.Sequential]:
    """The stages of a body, the first at the stem's sides and each other at half of those before.

    is_separate: a norm and a 2x2 convolution halve the sides before the blocks; else the first
    block does. drop_path: of the last block; it grows linearly from 0 at the first.
    """
    stages, channels, number = [], stem_channels, 0
    for depth, width in zip(depths, widths, strict=True):
        stride = 2 if stages else 1
        layers = OrderedDict()
        if is_separate and stages:
            layers["downsample"], stride = (
                _downsampling(form, channels, form.out_channels(width)),
                1,
            )
            channels = form.out_channels(width)
        blocks = []
        for place in range(depth):
            rate = drop_path * number / max(sum(depths) - 1, 1)
            blocks.append(StagedBlock(form, channels, width, 1 if place else stride, rate))
            channels, number = form.out_channels(width), number + 1
        layers["blocks"] = nn.Sequential(*blocks)
        stages.append(Stage(layers) if is_separate else layers["blocks"])
    return stages


def start(module: nn.Module) -> None:
    """Draw first weights as timm draws a ResNet's convolutions: Kaiming's normal by what comes out;
    biases are 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def with_channels(convolution: nn.Conv2d, out_channels: int) -> nn.Conv2d:
    """A convolution like another, with other output channels and weights of its own."""
    made = nn.Conv2d(
        convolution.in_channels, out_channels, convolution.kernel_size, convolution.stride,
        convolution.padding, convolution.dilation, bias=convolution.bias is not None,
    )  # fmt: skip
    start(made)
    return made


def _convolution(shape: _Shape, has_bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        shape.in_channels, shape.out_channels, shape.kernel_px, shape.stride, shape.kernel_px // 2,
        groups=shape.groups, bias=has_bias,
    )  # fmt: skip


def _downsampling(form: BlockForm, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        form.norm(in_channels), nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2)
    )
