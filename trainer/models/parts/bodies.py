"""The whole body of a model, rebuilt: the steps from a ResNet-50 to a ConvNeXt-T."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models.resnet import Bottleneck, ResNet, downsample_avg, downsample_conv
from torch import Tensor, nn

from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    replace_module,
)

BlockCount = Annotated[int, Field(ge=1, le=4096)]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class StagedBody(Part):
    """The four stages of a ResNet, built anew from blocks of three convolutions.

    depths, widths: blocks and channels of each stage; the stem gets the first stage's width. A
    block is 1x1, k x k, 1x1 and a shortcut, with a 1x1 convolution in it where the channels or the
    resolution change. block: "bottleneck" has `width` channels in the middle and four times as many
    at its end; "depthwise" is the same with a depthwise k x k; "inverted" is depthwise too, with
    `width` channels at its end and four times as many in the middle; "inverted_moved_up" has the
    k x k first, on the input channels. kernel_px: k. activations: "all" is one after each of the
    first two norms and one after the addition; "one" is that before the block's last convolution
    alone, and none after the stem. norms: "all" is one after each convolution; "one" is that after
    the k x k alone, with a bias in each convolution of block and stem; a shortcut's convolution
    keeps its norm. downsampling: "in_block" is a stride in the first block of a stage; "separate"
    is a norm and a 2x2 convolution of stride 2 before its blocks, and a layer norm after the
    pooling.

    The classifier is initialized anew; norms and activations are of the model's own kind, and
    model.norm and model.activation are applied afterwards. drop_path grows from 0 at the first
    block to the model's rate at the last.

    Raises ReplacementError for a model other than a ResNet of plain bottlenecks.
    Source: Liu et al. 2022, arXiv:2201.03545, section 2, Figure 3 and Table 10.
    """

    example: ClassVar[dict[str, Any]] = {
        "depths": [3, 3, 9, 3], "widths": [96, 192, 384, 768], "block": "inverted_moved_up",
        "kernel_px": 7, "activations": "one", "norms": "one", "downsampling": "separate",
    }  # fmt: skip
    depths: tuple[BlockCount, BlockCount, BlockCount, BlockCount]
    widths: tuple[BlockCount, BlockCount, BlockCount, BlockCount]
    block: Literal["bottleneck", "depthwise", "inverted", "inverted_moved_up"]
    kernel_px: Annotated[int, Field(ge=1, le=31)]
    activations: Literal["all", "one"]
    norms: Literal["all", "one"]
    downsampling: Literal["in_block", "separate"]

    @field_validator("kernel_px")
    @classmethod
    def _kernel_has_a_middle(cls, kernel_px: int) -> int:
        if kernel_px % 2 == 0:
            raise ValueError(
                f"{kernel_px} is even; use an odd number such as {kernel_px - 1} or {kernel_px + 1}"
            )
        return kernel_px

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace a ResNet's four stages, and add the norm that separate downsampling needs."""

        resnet, old = _plain_bottlenecks(model)
        form = BlockForm(
            self.block, self.kernel_px, self.activations, self.norms, type(resnet.bn1),
            type(old[0].act3),
            pools_shortcuts=any(
                isinstance(part, nn.AvgPool2d) for block in old for part in block.modules()
            ),
        )  # fmt: skip
        is_separate, starts_at_zero = (
            self.downsampling == "separate",
            not any(block.bn3.get_parameter("weight").any() for block in old),
        )
        notes = self._fit_stem(resnet)
        stages = make_stages(
            form, self.widths[0], self.depths, self.widths, is_separate, _drop_path(old)
        )
        for name, stage in zip(_STAGES, stages, strict=True):
            init_convolutions(stage)
            replace_module(model, name, stage)
        new = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, StagedBlock)
        }
        for block in new.values() if starts_at_zero else ():
            block.zero_init_last()
        notes += _fit_head(resnet, [form.out_channels(width) for width in self.widths], is_separate)
        return Replacement(
            "body", counted(old), f"{len(new)} {self.block}", tuple(new), ", ".join(notes)
        )

    def _fit_stem(self, model: ResNet) -> list[str]:
        """Adapt the stem to the first stage's width, and to activations and norms of "one"; returns
        notes.
        """

        notes, width, before = [], self.widths[0], model.bn1.num_features
        last, convolution = [
            (name, module)
            for name, module in model.conv1.named_modules(prefix="conv1")
            if isinstance(module, nn.Conv2d)
        ][-1]
        if before != width:
            replace_module(model, last, with_channels(convolution, width))
            model.bn1 = type(model.bn1)(width)
            model.feature_info[0]["num_chs"] = width
            notes.append(f"stem {before} -> {width} channels")
        if self.activations == "one":
            model.act1 = nn.Identity()
            notes.append("stem without activation")
        if self.norms == "one":
            model.get_submodule(last).bias = nn.Parameter(torch.zeros(width))
            notes.append("stem with bias")
        return notes


def _plain_bottlenecks(model: nn.Module) -> tuple[ResNet, list[Bottleneck]]:
    """The blocks of a ResNet; rejected where they have features that the new body would lack."""
    if not isinstance(model, ResNet):
        raise _not_plain(f"{type(model).__name__} is not a timm ResNet")
    blocks = [block for name in _STAGES for block in getattr(model, name)]
    extras = [
        block.aa
        for block in blocks
        if not isinstance(getattr(block, "aa", None), (nn.Identity, type(None)))
    ]
    extras += [block.se for block in blocks if getattr(block, "se", None) is not None]
    if {type(block) for block in blocks} != {Bottleneck}:
        found = f"the blocks are {type(blocks[0]).__name__}, not Bottleneck"
    elif blocks[0].conv2.groups > 1:
        found = f"the blocks have {blocks[0].conv2.groups} groups, which the new body would lack"
    elif extras:
        found = f"the blocks have {type(extras[0]).__name__}, which the new body would lack"
    elif not isinstance(model.bn1, nn.BatchNorm2d) or not isinstance(model.maxpool, nn.MaxPool2d):
        found = f"the stem has {type(model.bn1).__name__} and {type(model.maxpool).__name__}"
    else:
        return model, blocks
    raise _not_plain(found)


def _not_plain(found: str) -> ReplacementError:
    return ReplacementError(f"model.body: {found}; use model=resnet50, or leave model.body out")


def _drop_path(blocks: list[Bottleneck]) -> float:
    """The largest drop-path rate of any block."""
    return max((getattr(block.drop_path, "drop_prob", 0.0) for block in blocks), default=0.0)


def _fit_head(model: ResNet, channels: list[int], has_norm: bool) -> list[str]:
    """Adapt the classifier to the last stage's channels; returns notes."""
    model.num_features = channels[-1]
    for place, num_channels in enumerate(channels, start=1):
        model.feature_info[place]["num_chs"] = num_channels
    model.reset_classifier(model.num_classes)
    if has_norm:
        model.global_pool = NormedPool(model.global_pool.pool_type, channels[-1])
    return ["a layer norm after the pooling"] if has_norm else []


# He et al. 2015 and Liu et al. 2022 alike: the wide end of a block is four times the narrow one
_EXPANSION = 4
_LAYER_NORM_EPS = 1e-6  # after the pooling: Liu et al. 2022, in their code

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

    kind, kernel_px, activations, norms: as StagedBody's. norm, activation: classes; a norm is built
    from the number of channels. pools_shortcuts: a strided shortcut has average pooling before its
    1x1 convolution.
    """

    kind: BlockKind
    kernel_px: int
    activations: HowMany
    norms: HowMany
    norm: type[nn.Module]
    activation: type[nn.Module]
    pools_shortcuts: bool

    def out_channels(self, width: int) -> int:
        """The output channels of a block: its width, or four times that for a bottleneck."""
        return width * (_EXPANSION if self.kind in ("bottleneck", "depthwise") else 1)

    @property
    def spatial(self) -> int:
        """Which of the three convolutions, counted from 1, is the k x k."""
        return 1 if self.kind == "inverted_moved_up" else 2

    def shapes(self, in_channels: int, width: int, stride: int) -> tuple[_Shape, _Shape, _Shape]:
        """The three convolutions of a block, in order."""
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

    The forward pass and the layer names are those of timm's Bottleneck; an absent layer is an
    identity. With all norms no convolution has a bias; with one norm, as in ConvNeXt, each has.
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
    """Blocks after a downsampling layer of their own."""


class NormedPool(SelectAdaptivePool2d):
    """Global pooling to [B, C], then a layer norm over C."""

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
    """The stages of a body, the first at the stem's resolution, each other at half the one before.

    is_separate: a norm and a 2x2 convolution downsample before the blocks; else the first block
    does. drop_path: of the last block; it grows linearly from 0 at the first.
    """
    stages: list[nn.Sequential] = []
    channels, number = stem_channels, 0
    for depth, width in zip(depths, widths, strict=True):
        stride = 2 if stages else 1
        layers: OrderedDict[str, nn.Module] = OrderedDict()
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
        layers["blocks"] = series = nn.Sequential(*blocks)
        stages.append(Stage(layers) if is_separate else series)
    return stages


def init_convolutions(module: nn.Module) -> None:
    """Initialize convolutions as in timm's ResNet: Kaiming normal with fan_out, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def with_channels(convolution: nn.Conv2d, out_channels: int) -> nn.Conv2d:
    """A new convolution like another, with other output channels."""
    options: dict[str, Any] = {
        key: getattr(convolution, key) for key in ("kernel_size", "stride", "padding", "dilation")
    }
    made = nn.Conv2d(
        convolution.in_channels, out_channels, bias=convolution.bias is not None, **options
    )
    init_convolutions(made)
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
