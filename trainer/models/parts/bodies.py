"""The whole body of a model, rebuilt: the steps from a ResNet-50 to a ConvNeXt-T."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from trainer.models.edit.replacement import Part, SurgeryError, Swap, counted, put

Count = Annotated[int, Field(ge=1, le=4096)]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class StagedBody(Part):
    """The four stages of a ResNet, built anew from blocks of three convolutions.

    depths, widths: blocks and channels of each stage; the stem gets the first stage's width. A
    block is 1x1, k x k, 1x1 and a shortcut around them, with a 1x1 convolution in it where the
    channels or the sides change. block: "bottleneck" is `width` channels in the middle and four
    times as many behind; "depthwise" is the same with one filter a channel in its k x k; "inverted"
    is depthwise too, with `width` channels behind and four times as many in the middle;
    "inverted_moved_up" has the k x k first, on the channels that come in. kernel_px: k.
    activations: "all" is one behind the first two norms and one behind the sum; "one" is that
    before the block's last convolution alone, and none behind the stem. norms: "all" is one behind
    each convolution; "one" is that behind the k x k alone, with a bias in each convolution of block
    and stem; a shortcut's convolution keeps its norm. downsampling: "in_block" is a stride in the
    first block of a stage; "separate" is a norm and a 2x2 convolution of stride 2 before its
    blocks, and a layer norm behind the pooling.

    The classifier is drawn anew; norms and activations are of the model's own kind, and what the
    page says of them is done afterwards. drop_path grows from 0 at the first block to the model's
    rate at the last.

    Raises SurgeryError for a model other than a ResNet of plain bottlenecks.
    Source: Liu et al. 2022, arXiv:2201.03545, section 2, Figure 3 and Table 10.
    """

    example: ClassVar[dict[str, Any]] = {
        "depths": [3, 3, 9, 3], "widths": [96, 192, 384, 768], "block": "inverted_moved_up",
        "kernel_px": 7, "activations": "one", "norms": "one", "downsampling": "separate",
    }  # fmt: skip
    depths: tuple[Count, Count, Count, Count]
    widths: tuple[Count, Count, Count, Count]
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
                f"{kernel_px} is even and has no middle; write {kernel_px - 1} or {kernel_px + 1}"
            )
        return kernel_px

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Put new stages in the place of a ResNet's four, and norms where separate downsampling
        wants them.
        """
        from trainer.models.parts.body_layers import BlockForm, StagedBlock, make_stages, start

        old = _plain_bottlenecks(model)
        form = BlockForm(
            self.block, self.kernel_px, self.activations, self.norms, type(model.bn1),
            type(old[0].act3),
            pools_shortcuts=any(isinstance(part, nn.AvgPool2d) for block in old for part in block.modules()),
        )  # fmt: skip
        is_separate, starts_at_zero = (
            self.downsampling == "separate",
            not any(block.bn3.weight.any() for block in old),
        )
        notes = self._fit_stem(model)
        stages = make_stages(
            form, self.widths[0], self.depths, self.widths, is_separate, _drop_path(old)
        )
        for name, stage in zip(_STAGES, stages, strict=True):
            start(stage)
            put(model, name, stage)
        new = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, StagedBlock)
        }
        for block in new.values() if starts_at_zero else ():
            block.zero_init_last()
        notes += _fit_head(model, [form.out_channels(width) for width in self.widths], is_separate)
        return Swap("body", counted(old), f"{len(new)} {self.block}", tuple(new), ", ".join(notes))

    def _fit_stem(self, model: nn.Module) -> list[str]:
        """Give the stem the first stage's width, and what "one" takes from it or adds to it; say
        so.
        """
        from trainer.models.parts.body_layers import with_channels

        notes, width, before = [], self.widths[0], model.bn1.num_features
        last = [
            name
            for name, module in model.conv1.named_modules(prefix="conv1")
            if isinstance(module, nn.Conv2d)
        ][-1]
        if before != width:
            put(model, last, with_channels(model.get_submodule(last), width))
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


def _plain_bottlenecks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a ResNet; refused where there is more to them than a body would put in their
    place.
    """
    from timm.models.resnet import Bottleneck, ResNet

    blocks = (
        [block for name in _STAGES for block in getattr(model, name)]
        if isinstance(model, ResNet)
        else []
    )
    extras = [
        block.aa
        for block in blocks
        if not isinstance(getattr(block, "aa", None), (nn.Identity, type(None)))
    ]
    extras += [block.se for block in blocks if getattr(block, "se", None) is not None]
    if not blocks:
        found = f"{type(model).__name__} is no ResNet of timm's"
    elif {type(block) for block in blocks} != {Bottleneck}:
        found = f"the blocks are {type(blocks[0]).__name__}, not Bottleneck"
    elif blocks[0].conv2.groups > 1:
        found = f"the blocks have {blocks[0].conv2.groups} groups, which a new body would drop"
    elif extras:
        found = f"the blocks have {type(extras[0]).__name__}, which a new body would drop"
    elif not isinstance(model.bn1, nn.BatchNorm2d) or not isinstance(model.maxpool, nn.MaxPool2d):
        found = f"the stem has {type(model.bn1).__name__} and {type(model.maxpool).__name__}"
    else:
        return blocks
    raise SurgeryError(f"model.body: {found}; use model=resnet50, or leave model.body out")


def _drop_path(blocks: list[nn.Module]) -> float:
    """The largest rate at which any of the blocks leaves out its branch."""
    return max(
        (block.drop_path.drop_prob for block in blocks if block.drop_path is not None), default=0.0
    )


def _fit_head(model: nn.Module, channels: list[int], has_norm: bool) -> list[str]:
    """Put a new classifier over the last stage's channels, behind a layer norm or not; say so."""
    from trainer.models.parts.body_layers import NormedPool

    model.num_features = channels[-1]
    for place, num_channels in enumerate(channels, start=1):
        model.feature_info[place]["num_chs"] = num_channels
    model.reset_classifier(model.num_classes)
    if has_norm:
        model.global_pool = NormedPool(model.global_pool.pool_type, channels[-1])
    return ["a layer norm behind the pooling"] if has_norm else []
