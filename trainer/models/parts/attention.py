"""Feature maps weighed by what the whole image shows."""

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
from trainer.models.edit.replacement import Part, SurgeryError, Swap, counted, is_attention
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
    """Attention put into a model that has none."""

    kind: ClassVar[str] = "attention"


class _InBlocks(Attention):
    """position: `after_last_norm`, at the end of the residual branch, before layer scale and the
    addition; `after_middle`, behind the activation of the 3x3 of a bottleneck or of a basic block's
    first convolution, in ConvNeXt behind the norm of the depthwise convolution; `after_block`,
    behind the addition. stages: in how many last stages; None for all.

    Weights are drawn by the rule that timm has for the rest of the model.

    Raises SurgeryError for a model that has attention already: a second one would come on top, not
    in its place.
    """

    position: Position
    stages: Stages | None = None

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Put one module into each block of the chosen stages."""
        _refuse_attention(model)
        chosen = [name for stage in last_stages(model, "attention", self.stages) for name in stage]
        places = _PLACES[self.position](model, chosen, "attention")
        before = counted(model.get_submodule(name) for name in chosen)
        layers = [self._new(model, place.num_channels) for place in places]
        for place, layer in zip(places, layers, strict=True):
            place.insert(layer)
        check_inserted(model, "attention", [(place.block, place.name) for place in places])
        widths = dict.fromkeys(place.num_channels for place in places)
        return Swap(
            "attention",
            before,
            _with(layers[0]),
            tuple(place.name for place in places),
            self._note(widths),
        )

    def _new(self, model: nn.Module, num_channels: int) -> nn.Module:
        layer = self._layer(num_channels)
        init_like_timm(model, layer)
        if hasattr(layer, "reset_parameters"):  # what its paper fixes of the first weights
            layer.reset_parameters()
        return layer

    @abstractmethod
    def _layer(self, num_channels: int) -> nn.Module: ...

    @abstractmethod
    def _note(self, widths: dict[int, None]) -> str: ...


class _Reduced(_InBlocks):
    """reduction: how many times fewer hidden channels than channels; the quotient is rounded down."""

    reduction: Reduction

    def _hidden(self, num_channels: int) -> int:
        return _reduced(num_channels, self.reduction)

    def _note(self, widths: dict[int, None]) -> str:
        return "hidden widths " + ", ".join(str(self._hidden(width)) for width in widths)


class SqueezeExcite(_Reduced):
    """Each channel times a gate that two small layers make of all channels' means (SE).

    reduction: hidden channels are exactly num_channels / reduction; timm's own models round them to
    eights, which differs below 128 channels at a reduction of 16.

    Source: Hu et al. 2017, arXiv:1709.01507.
    """

    name: Literal["squeeze_excite"] = "squeeze_excite"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}

    def _layer(self, num_channels: int) -> nn.Module:
        return SEModule(num_channels, rd_channels=self._hidden(num_channels))


class Eca(_InBlocks):
    """Each channel times a gate that a short convolution along the channels makes of their means
    (ECA).

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

    def _layer(self, num_channels: int) -> nn.Module:
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
    """A gate for channels, from their means and maxima, then one for places, from mean and maximum
    over channels.

    reduction: hidden channels are exactly num_channels / reduction. kernel: of the convolution over
    places, odd. No biases, and a BatchNorm behind the convolution, as in the authors' code.

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
    """A map of channels and a map of places, added and gated, at the end of each stage but the last
    (BAM).

    reduction: how many times fewer hidden channels than channels. dilation, num_convolutions: of
    its 3x3 convolutions. What is computed, and where the authors' code differs:
    attention_layers.BottleneckAttention.

    Raises SurgeryError for a model that has attention already, or a single stage.
    Source: Park et al. 2018, arXiv:1807.06514.
    """

    name: Literal["bam"] = "bam"
    example: ClassVar[dict[str, Any]] = {"reduction": 16, "dilation": 4, "num_convolutions": 2}
    reduction: Reduction
    dilation: Annotated[int, Field(ge=1, le=16)]
    num_convolutions: Annotated[int, Field(ge=1, le=8)]

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Put one module behind the last block of each of the first three stages."""
        _refuse_attention(model)
        last_blocks = [stage[-1] for stage in blocks(model)[:-1][:3]]
        if not last_blocks:
            raise SurgeryError(
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
            model.get_submodule(series).add_module(
                "attention", layer
            )  # a series runs its children one by one
            places.append(f"{series}.attention")
        check_inserted(model, "attention", zip(last_blocks, places, strict=True))
        hidden = ", ".join(str(_reduced(width, self.reduction)) for width in widths.values())
        return Swap("attention", before, _with(layer), tuple(places), f"hidden widths {hidden}")


class GlobalContext(_Reduced):
    """To each place is added what two small layers make of a weighted mean over all places (GCNet's
    block).

    reduction: hidden channels are exactly num_channels / reduction. The last layer starts at zero,
    so that the block starts as if it were not there. timm's layer can also gate; the paper adds,
    and so does this.

    Source: Cao et al. 2019, arXiv:1904.11492.
    """

    name: Literal["global_context"] = "global_context"
    example: ClassVar[dict[str, Any]] = {"position": "after_last_norm", "reduction": 16}

    def _layer(self, num_channels: int) -> nn.Module:
        layer = GlobalContextLayer(
            num_channels, fuse_add=True, fuse_scale=False, rd_channels=self._hidden(num_channels)
        )
        nn.init.zeros_(layer.mlp_add.fc2.bias)  # timm zeroes its weight only
        return layer


class CoordinateAttention(_Reduced):
    """Each place times a gate for its row and one for its column, made of the means along both.

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
        raise SurgeryError(
            f"model.attention: {type(model).__name__} has {has} already, to which it would add; "
            "use a model without attention, such as resnet50"
        )


def _with(layer: nn.Module) -> str:
    return f"the same with {type(layer).__name__}"


def _reduced(num_channels: int, reduction: int) -> int:
    if num_channels < reduction:
        raise SurgeryError(
            f"model.attention.reduction={reduction}: a block has {num_channels} channels; use {num_channels} or less"
        )
    return num_channels // reduction


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"{kernel} is even, so it has no middle; use {kernel + 1}")
    return kernel


@ATTENTION.register
class BottleneckAttention(nn.Module):
    """What a feature map F becomes under BAM: F + F * sigmoid(c + s), a map of channels plus a map
    of places.

    c = norm(W1 relu(W0 mean(F) + b0) + b1), one number a channel, with num_channels / reduction
    hidden ones; s = norm(1x1(relu(3x3( … relu(1x1(F)))))), one number a place, its 3x3 convolutions
    dilated. Both norms are BatchNorm, over all images of a micro-batch: it must have two at least.

    Called with features [B, C, H, W]; gives the same shape.
    The formulas are the paper's, with a ReLU behind each inner layer, of which it gives no sign.
    Its authors' released code differs: BatchNorm behind each inner layer and none at the end, and
    the product of the two in place of the sum.

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
