"""ShuffleNet, first version: grouped pointwise convolutions with a shuffle of channels between.

Source: Zhang et al. 2017, arXiv:1707.01083; github.com/megvii-model/ShuffleNet-Series, whose
channels and first weights these are. Its weights are for BGR images of 0 to 255.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.zoo.common import ZooModel, image_facts, register_variants

_DEPTHS = (4, 8, 4)


class ShuffleUnit(nn.Module):
    """Pointwise in groups, shuffle, depthwise 3x3, pointwise in groups: [B, C, H, W].

    With a stride of 2 the pooled input is concatenated in front, otherwise it is added. is_first:
    the network's first pointwise convolution has one group, as its input has few channels. The
    shuffle stands after the depthwise convolution, as in the authors' code; the paper has it
    before, which differs by the order of the middle channels alone.
    """

    def __init__(self, before: int, after: int, groups: int, stride: int, is_first: bool) -> None:
        super().__init__()
        self.groups = groups
        middle = after // 4
        branch = after - before if stride == 2 else after
        self.conv1 = nn.Conv2d(before, middle, 1, groups=1 if is_first else groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.act3 = nn.ReLU()
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        # each group gets every groups-th channel, so some of every group before
        out = out.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(1, 2)
        out = self.bn3(self.conv3(out))
        if self.pool is None:
            return self.act3(out + x)
        return torch.cat((self.pool(x), self.act3(out)), dim=1)


class ShuffleNetV1(ZooModel):
    """width: channels of the first stage's output, doubled by each that follows."""

    head_has_bias = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_width: int = 24,
        width: int = 240,
        groups: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, 4 * width, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.act1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, before = [], stem_width
        for i, depth in enumerate(_DEPTHS):
            after, units = width * 2**i, []
            for j in range(depth):
                stride = 1 if j else 2
                units.append(ShuffleUnit(before, after, groups, stride, is_first=i == j == 0))
                before = after
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": width * 2**i, "reduction": 8 * 2**i, "module": f"stages.{i}"}
            for i in range(len(_DEPTHS))
        ]
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        self.apply(_init)
        nn.init.normal_(self.conv1.weight, std=0.01)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^conv1|^bn1", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [B, C, H, W]."""
        return self.stages(self.maxpool(self.act1(self.bn1(self.conv1(x)))))

    def pool(self, x: Tensor) -> Tensor:
        return self.global_pool(x).flatten(1)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        # a deviation of 1 / inputs, the kernel not counted
        nn.init.normal_(module.weight, std=1 / module.weight.shape[1])
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.bias, 1e-4)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)


_LAYERS = {  # in the authors' branches: here
    "branch_main_1.0": "conv1", "branch_main_1.1": "bn1", "branch_main_1.3": "conv2",
    "branch_main_1.4": "bn2", "branch_main_2.0": "conv3", "branch_main_2.1": "bn3",
    "first_conv.0": "conv1", "first_conv.1": "bn1", "classifier.0": "head",
}  # fmt: skip
_PLACES = [f"stages.{i}.{j}" for i, depth in enumerate(_DEPTHS) for j in range(depth)]


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names: their features.4 is stages.1.0."""

    def ours(name: str) -> str:
        unit = re.match(r"features\.(\d+)\.(.*)", name)
        place, rest = (f"{_PLACES[int(unit[1])]}.", unit[2]) if unit else ("", name)
        layer, _, kind = rest.rpartition(".")
        return f"{place}{_LAYERS.get(layer, layer)}.{kind}"

    return {ours(name): tensor for name, tensor in weights.items()}


_WIDTHS = {  # by groups and multiple: of the stem, of the first stage
    3: {"050": (12, 120), "100": (24, 240), "150": (24, 360), "200": (48, 480)},
    8: {"050": (16, 192), "100": (24, 384), "150": (24, 576), "200": (48, 768)},
}
register_variants(
    ShuffleNetV1,
    {
        f"shufflenet_v1_g{groups}_{multiple}": (
            {"groups": groups, "stem_width": stem, "width": width},
            image_facts(first_conv="conv1", crop_pct=0.875, interpolation="bilinear"),
        )
        for groups, widths in _WIDTHS.items()
        for multiple, (stem, width) in widths.items()
    },
    checkpoint_filter_fn,
)
