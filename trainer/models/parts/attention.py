"""Attention modules added to residual blocks or stages."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from timm.layers import EcaModule, SEModule
from timm.layers import GlobalContext as GlobalContextLayer
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from trainer.models.edit.insertion import (
    block_ends,
    branch_ends,
    branch_middles,
    check_inserted,
    init_like_timm,
    last_stages,
    output_shapes,
)
from trainer.models.edit.layer_kinds import ATTENTION, CONVOLVING_ATTENTION
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    is_attention,
)
from trainer.models.edit.stages import blocks

Reduction = Annotated[int, Field(ge=1, le=256)]
Position = Literal["after_last_norm", "after_middle", "after_block"]
Stages = Annotated[int, Field(ge=1, le=4)]
Kernel = Annotated[int, Field(ge=1, le=31)]

_PLACES = {
    "after_last_norm": branch_ends,
    "after_middle": branch_middles,
    "after_block": block_ends,
}


class Attention(Part):
    """Attention added to a model that has none."""

    kind: ClassVar[str] = "attention"


class _InBlocks(Attention):
    """position: `after_last_norm`, at the end of the residual branch, before layer scale and the
    addition; `after_middle`, after the activation of a bottleneck's 3x3 or of a basic block's first
    convolution, in ConvNeXt after the norm of the depthwise convolution; `after_block`, after the
    addition. stages: in how many last stages; None for all.

    Weights are initialized as timm initializes the rest of the model.

    Raises ReplacementError for a model that has attention already: this one would come on top of
    it.
    """

    position: Position
    stages: Stages | None = None

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Add one module to each block of the chosen stages."""
        _refuse_attention(model)
        chosen = [name for stage in last_stages(model, "attention", self.stages) for name in stage]
        places = _PLACES[self.position](model, chosen, "attention")
        before = counted(model.get_submodule(name) for name in chosen)
        layers = [self._new(model, place.num_channels) for place in places]
        for place, layer in zip(places, layers, strict=True):
            place.insert(layer)
        check_inserted(model, "attention", [(place.block, place.name) for place in places])
        widths = dict.fromkeys(place.num_channels for place in places)
        return Replacement(
            "attention",
            before,
            _with(layers[0]),
            tuple(place.name for place in places),
            self._note(widths),
        )

    def _new(self, model: nn.Module, num_channels: int) -> nn.Module:
        layer = self._layer(num_channels)
        init_like_timm(model, layer)
        reset = getattr(layer, "reset_parameters", None)
        if reset is not None:  # where its paper prescribes initial weights
            reset()
        return layer

    @abstractmethod
    def _layer(self, num_channels: int) -> nn.Module: ...

    @abstractmethod
    def _note(self, widths: dict[int, None]) -> str: ...


class _Reduced(_InBlocks):
    """reduction: hidden channels are num_channels / reduction, rounded down."""

    reduction: Reduction

    def _hidden(self, num_channels: int) -> int:
        return _reduced(num_channels, self.reduction)

    def _note(self, widths: dict[int, None]) -> str:
        return "hidden widths " + ", ".join(str(self._hidden(width)) for width in widths)


class SqueezeExcite(_Reduced):
    """Each channel times a gate computed by two small layers from all channel means (SE).

    reduction: hidden channels are exactly num_channels / reduction; timm's own models round them to
    eights, which differs below 128 channels at a reduction of 16.

    Source: Hu et al. 2017, arXiv:1709.01507.
    """

    name: Literal["squeeze_excite"] = "squeeze_excite"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}

    def _layer(self, num_channels: int) -> nn.Module:
        return SEModule(num_channels, rd_channels=self._hidden(num_channels))


class Eca(_InBlocks):
    """Each channel times a gate computed by a short convolution over the channel means (ECA).

    kernel: its length, odd; None for the paper's rule, the odd number next to (log2(num_channels) +
    1) / 2, at least 3.

    Source: Wang et al. 2019, arXiv:1910.03151.
    """

    name: Literal["eca"] = "eca"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm"}
    kernel: Kernel | None = None

    @field_validator("kernel")
    @classmethod
    def _is_odd(cls, kernel: int | None) -> int | None:
        return kernel if kernel is None else _odd(kernel)

    def _layer(self, num_channels: int) -> EcaModule:
        return (
            EcaModule(channels=num_channels)
            if self.kernel is None
            else EcaModule(kernel_size=self.kernel)
        )

    def _note(self, widths: dict[int, None]) -> str:
        return "kernels " + ", ".join(
            str(self._layer(width).conv.kernel_size[0]) for width in widths
        )


class Cbam(_Reduced):
    """A gate per channel, from spatial means and maxima, then one per pixel, from the mean and
    maximum over channels.

    reduction: hidden channels are exactly num_channels / reduction. kernel: of the convolution over
    pixels, odd. No biases, and a BatchNorm after the convolution, as in the authors' code.

    Source: Woo et al. 2018, arXiv:1807.06521.
    """

    name: Literal["cbam"] = "cbam"
    example: ClassVar[dict[str, Any]] = {
        "position": "after_last_norm",
        "reduction": 16,
        "kernel": 7,
    }
    kernel: Kernel

    @field_validator("kernel")
    @classmethod
    def _is_odd(cls, kernel: int) -> int:
        return _odd(kernel)

    def _layer(self, num_channels: int) -> nn.Module:
        hidden = self._hidden(num_channels)
        return CbamModule(num_channels, rd_channels=hidden, spatial_kernel_size=self.kernel)


class Bam(Attention):
    """A channel and a spatial map, added and gated, at the end of each stage but the last (BAM).

    reduction: hidden channels are num_channels / reduction. dilation, num_convolutions: of
    its 3x3 convolutions. For the formula, and where the authors'
    code differs, see BottleneckAttention.

    Raises ReplacementError for a model that has attention already, or a single stage.
    Source: Park et al. 2018, arXiv:1807.06514.
    """

    name: Literal["bam"] = "bam"
    example: ClassVar[dict[str, Any]] = {"reduction": 16, "dilation": 4, "num_convolutions": 2}
    reduction: Reduction
    dilation: Annotated[int, Field(ge=1, le=16)]
    num_convolutions: Annotated[int, Field(ge=1, le=8)]

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Put one module behind the last block of each of the first three stages."""
        _refuse_attention(model)
        last_blocks = [stage[-1] for stage in blocks(model)[:-1][:3]]
        if not last_blocks:
            raise ReplacementError(
                f"model.attention: {type(model).__name__} has one stage; use squeeze_excite"
            )
        widths = {name: shape[1] for name, shape in output_shapes(model, last_blocks).items()}
        before = counted(model.get_submodule(name) for name in last_blocks)
        places = []
        for name in last_blocks:
            hidden = _reduced(widths[name], self.reduction)
            layer = BottleneckAttention(widths[name], hidden, self.dilation, self.num_convolutions)
            init_like_timm(model, layer)
            series = name.rpartition(".")[0]
            # a series runs its children one by one
            model.get_submodule(series).add_module("attention", layer)
            places.append(f"{series}.attention")
        check_inserted(model, "attention", zip(last_blocks, places, strict=True))
        reduced = ", ".join(str(_reduced(width, self.reduction)) for width in widths.values())
        return Replacement(
            "attention", before, _with(layer), tuple(places), f"hidden widths {reduced}"
        )


class GlobalContext(_Reduced):
    """Adds to every pixel what two small layers compute from a weighted mean over all pixels
    (GCNet's block).

    reduction: hidden channels are exactly num_channels / reduction. The last layer starts at zero,
    so that the block starts as an identity. timm's layer can also gate; the paper adds, and so does
    this.

    Source: Cao et al. 2019, arXiv:1904.11492.
    """

    name: Literal["global_context"] = "global_context"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}

    def _layer(self, num_channels: int) -> nn.Module:
        layer = GlobalContextLayer(
            num_channels, fuse_add=True, fuse_scale=False, rd_channels=self._hidden(num_channels)
        )
        nn.init.zeros_(layer.mlp_add.fc2.get_parameter("bias"))  # timm zeroes its weight only
        return layer


class CoordinateAttention(_Reduced):
    """Each pixel times a gate for its row and one for its column, from the means along both.

    reduction: hidden channels are num_channels / reduction, and eight at least, as in the authors'
    code; timm's layer takes two thirds of that. Its convolutions have no biases, theirs have.

    Source: Hou et al. 2021, arXiv:2103.02907.
    """

    name: Literal["coordinate_attention"] = "coordinate_attention"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 32}

    def _hidden(self, num_channels: int) -> int:
        return max(8, num_channels // self.reduction)

    def _layer(self, num_channels: int) -> nn.Module:
        return CoordAttn(num_channels, rd_channels=self._hidden(num_channels))


def _refuse_attention(model: nn.Module) -> None:
    there = [
        module
        for module in model.modules()
        if is_attention(module) or CONVOLVING_ATTENTION.has(module)
    ]
    whole = [kind for kind in counted(there) if kind[0] not in ("ChannelAttn", "SpatialAttn")]
    if whole:
        has = ", ".join(f"{count} {kind}" for kind, count in whole)
        raise ReplacementError(
            f"model.attention: {type(model).__name__} already has attention ({has}); "
            "use a model without, such as resnet50"
        )


def _with(layer: nn.Module) -> str:
    return f"the same with {type(layer).__name__}"


def _reduced(num_channels: int, reduction: int) -> int:
    if num_channels < reduction:
        raise ReplacementError(
            f"model.attention.reduction={reduction}: a block has only {num_channels} channels; "
            f"use {num_channels} or less"
        )
    return num_channels // reduction


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"{kernel} is even; use an odd number such as {kernel + 1}")
    return kernel


@ATTENTION.register
class BottleneckAttention(nn.Module):
    """BAM of a feature map F: F + F * sigmoid(c + s), with a channel map c and a spatial map s.

    c = norm(W1 relu(W0 mean(F) + b0) + b1), one value per channel, with num_channels / reduction
    hidden ones; s = norm(1x1(relu(3x3( … relu(1x1(F)))))), one value per pixel, its 3x3
    convolutions dilated. Both norms are BatchNorm, so a micro-batch needs at least two images.

    Called with features [B, C, H, W]; returns the same shape.
    The formulas are the paper's, with a ReLU after each inner layer, which it does not mention. Its
    authors' released code differs: BatchNorm after each inner layer and none at the end, and the
    product of the two in place of the sum.

    Source: Park et al. 2018, arXiv:1807.06514, equations 1 to 4.
    """

    def __init__(self, num_channels: int, hidden: int, dilation: int, num_convolutions: int):
        super().__init__()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, num_channels, 1),
            nn.BatchNorm2d(num_channels),
        )
        wide = [
            layer
            for _ in range(num_convolutions)
            for layer in (
                nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
                nn.ReLU(inplace=True),
            )
        ]
        self.spatial = nn.Sequential(
            nn.Conv2d(num_channels, hidden, 1),
            nn.ReLU(inplace=True),
            *wide,
            nn.Conv2d(hidden, 1, 1),
            nn.BatchNorm2d(1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + features * (self.channel(features) + self.spatial(features)).sigmoid()
