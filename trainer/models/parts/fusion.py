"""What joins a residual branch with its shortcut in place of an addition: `model.fusion`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from trainer.models.edit.insertion import check_inserted, init_like_timm, last_stages, output_shapes
from trainer.models.edit.layer_kinds import ATTENTION
from trainer.models.edit.replacement import Part, Replacement, ReplacementError, counted


class Fusion(Part):
    """Replaces the additions of the last stages of a ResNet.

    reduction: the gates' hidden channels are a block's, divided by it. stages: in how many last
    stages. New weights are initialized as timm initializes the rest of the model.

    Raises ReplacementError for models of other blocks than timm's ResNets have.
    """

    kind: ClassVar[str] = "fusion"
    example: ClassVar[dict[str, Any]] = {"reduction": 16, "stages": 2}
    is_iterative: ClassVar[bool] = False

    reduction: Annotated[int, Field(ge=1, le=256)]
    stages: Annotated[int, Field(ge=1, le=4)]

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Give each block of the last stages a module `fusion` in place of its addition."""
        names = [name for stage in last_stages(model, "fusion", self.stages) for name in stage]
        blocks = {name: model.get_submodule(name) for name in names}
        before = counted(blocks.values())
        shapes = output_shapes(model, names)
        for name, block in blocks.items():
            if type(block) not in _FUSED:
                raise ReplacementError(
                    f"model.fusion: {name} is a {type(block).__name__}, whose addition cannot be "
                    "replaced; use a ResNet, such as resnet50"
                )
            width = shapes[name][1]
            if width < self.reduction:
                raise ReplacementError(
                    f"model.fusion.reduction={self.reduction}: {name} has only {width} channels; "
                    f"use {width} or less"
                )
            fusion = AttentionalFusion(width, width // self.reduction, self.is_iterative)
            init_like_timm(model, fusion)
            block.fusion = fusion
            block.__class__ = _FUSED[type(block)]  # as copies of the model then are
        places = [(name, f"{name}.fusion") for name in names]
        check_inserted(model, "fusion", places)
        after = f"the same, joined by {AttentionalFusion.__name__}"
        return Replacement("fusion", before, after, tuple(name for _, name in places))


class Aff(Fusion):
    """Attentional feature fusion: a gate per channel and pixel divides between branch and shortcut.

    See AttentionalFusion. Source: Dai et al. 2021, arXiv:2009.14082.
    """

    name: Literal["aff"] = "aff"


class Iaff(Fusion):
    """The same in two passes: the first one's result is what the second's gate is computed from.

    See AttentionalFusion. Source: Dai et al. 2021, arXiv:2009.14082.
    """

    name: Literal["iaff"] = "iaff"
    is_iterative: ClassVar[bool] = True


class Gate(nn.Module):
    """sigmoid(local(x) + global(x)) of features x [B, C, H, W], each pointwise through few hidden
    channels: local of each pixel, global of the mean over pixels.

    Both end in BatchNorm, so a micro-batch needs at least two images.
    """

    def __init__(self, num_channels: int, hidden: int) -> None:
        super().__init__()
        self.local_att = nn.Sequential(*self._layers(num_channels, hidden))
        self.global_att = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *self._layers(num_channels, hidden)
        )

    @staticmethod
    def _layers(num_channels: int, hidden: int) -> list[nn.Module]:
        return [
            nn.Conv2d(num_channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, num_channels, 1),
            nn.BatchNorm2d(num_channels),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return (self.local_att(x) + self.global_att(x)).sigmoid()


@ATTENTION.register
class AttentionalFusion(nn.Module):
    """A branch x and its shortcut r, both [B, C, H, W], joined by gates w; returns the same shape.

    Once: 2 x w(x + r) + 2 r (1 - w(x + r)), which is x + r at w = 1/2. Iterative: y = x w1(x + r) +
    r (1 - w1(x + r)), then x w2(y) + r (1 - w2(y)), with a second gate of its own weights and
    without the 2, as in the authors' code for MXNet; their port to PyTorch takes the first gate's
    global part twice.

    Source: Dai et al. 2021, arXiv:2009.14082; github.com/YimianDai/open-aff, model/fusion.py.
    """

    def __init__(self, num_channels: int, hidden: int, is_iterative: bool) -> None:
        super().__init__()
        self.gate = Gate(num_channels, hidden)
        self.gate2 = Gate(num_channels, hidden) if is_iterative else None

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        share = self.gate(branch + shortcut)
        if self.gate2 is None:
            return 2 * (branch * share + shortcut * (1 - share))
        share = self.gate2(branch * share + shortcut * (1 - share))
        return branch * share + shortcut * (1 - share)


def _fused(block: Any, branch: Tensor, x: Tensor) -> Tensor:
    """The end of timm's blocks, with `fusion` in place of the addition."""
    for module in (block.se, block.drop_path):
        if module is not None:
            branch = module(branch)
    shortcut = x if block.downsample is None else block.downsample(x)
    return block.fusion(branch, shortcut)


class FusedBasicBlock(BasicBlock):
    aa: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        branch = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.act2(_fused(self, self.bn2(self.conv2(branch)), x))


class FusedBottleneck(Bottleneck):
    aa: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(branch)))))
        return self.act3(_fused(self, self.bn3(self.conv3(branch)), x))


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
}
