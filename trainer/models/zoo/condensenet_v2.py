"""CondenseNetV2: a dense network whose 1x1 convolutions prune themselves into groups, reading the
features before them and adding to these again.

Source: Yang et al. 2021, arXiv:2104.04382; github.com/jianghaojun/CondenseNetV2, whose training
adds no lasso to its loss: the layers of its code could give one, and nothing asks them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from trainer.models.edit.hooks import ChangesInTraining, ConvertedForUse
from trainer.models.zoo.common import ZooModel, image_facts, register_variants

_BOTTLENECK = 4


def _activation(is_hard_swish: bool) -> nn.Module:
    return nn.Hardswish() if is_hard_swish else nn.ReLU()


class Pruned(ChangesInTraining, ConvertedForUse):
    """Norm, activation and a 1x1 convolution of `groups` interleaved groups, which lose what they
    need least in the first half of the training: [B, before, H, W] to [B, after, H, W].

    Progress p has stages 0 to groups - 1, floor(2 p (groups - 1)); at each, every group loses one
    more groups-th of its candidates, those of the smallest sum of absolute weights. So in the end
    one groups-th of the weights is left. mask: what is left, bool, a row for each group.

    The authors prune once where a step enters a stage, even if it passes over several: the same in
    runs of more than 2 (groups - 1) steps. They count stages within half the run and 0.05 % beyond;
    here whatever comes after half of it is the last stage.
    """

    mask: Tensor

    def __init__(self, before: int, after: int, groups: int, is_hard_swish: bool) -> None:
        super().__init__()
        self.groups = groups
        self.norm = nn.BatchNorm2d(before)
        self.act = _activation(is_hard_swish)
        self.conv = nn.Conv2d(before, after, 1, bias=False)
        self._stage: int | None = None  # only spares looking at the mask at every step

    def by_group(self, weight: Tensor) -> Tensor:
        """[groups, candidates, members] of a weight [after, before], as a view."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """The mask as [after, before]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self.kept()[:, :, None, None]
        return F.conv2d(self.act(self.norm(x)), weight)

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        stage = min(math.floor(2 * progress * (self.groups - 1)), self.groups - 1)
        if stage == self._stage:
            return
        self._stage = stage
        weights = self.by_group(self.conv.weight[:, :, 0, 0].abs()).sum(dim=2)
        # what is pruned comes first, whatever its weights have become
        order = weights.masked_fill(~self.mask, -1).sort(dim=1, stable=True).indices
        number = max(stage * self.mask.shape[1] // self.groups, int((~self.mask[0]).sum()))
        self.mask.scatter_(1, order[:, :number], False)

    @property
    def is_pruned(self) -> bool:
        """Does every group have no more left than its share?"""
        return int(self.mask[0].sum()) * self.groups == self.mask.shape[1]

    def _grouped(self, before: int, weight: Tensor) -> nn.Conv2d:
        """A 1x1 convolution in groups of a weight [after, before / groups]."""
        conv = nn.Conv2d(before, len(weight), 1, groups=self.groups, bias=False).to(weight)
        conv.weight.copy_(weight[:, :, None, None])
        return conv


class LearnedGroups(Pruned):
    """Each group prunes its inputs. Output channel o is of group o % groups."""

    def __init__(self, before: int, after: int, groups: int, is_hard_swish: bool) -> None:
        super().__init__(before, after, groups, is_hard_swish)
        self.register_buffer("mask", torch.ones(groups, before, dtype=torch.bool))

    def by_group(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, self.groups)).permute(1, 2, 0)

    def kept(self) -> Tensor:
        return self.mask.repeat(len(self.conv.weight) // self.groups, 1)

    @torch.no_grad()
    def converted(self) -> nn.Module:
        if not self.is_pruned:
            return self
        weights = self.by_group(self.conv.weight[:, :, 0, 0])
        index = self.mask.nonzero()[:, 1]
        grouped = torch.cat([own[kept].T for own, kept in zip(weights, self.mask, strict=True)])
        conv = self._grouped(self.conv.in_channels, grouped)
        return IndexedGroups(index, self.norm, self.act, conv)


class Reactivation(Pruned):
    """Each group prunes its outputs, which are added to the features before. Input channel j is of
    group j % groups.
    """

    def __init__(self, before: int, after: int, groups: int, is_hard_swish: bool) -> None:
        super().__init__(before, after, groups, is_hard_swish)
        self.register_buffer("mask", torch.ones(groups, after, dtype=torch.bool))

    def by_group(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, self.groups)).permute(2, 0, 1)

    def kept(self) -> Tensor:
        return self.mask.T.repeat(1, self.conv.weight.shape[1] // self.groups)

    @torch.no_grad()
    def converted(self) -> nn.Module:
        if not self.is_pruned:
            return self
        weights = self.by_group(self.conv.weight[:, :, 0, 0])
        index = self.mask.nonzero()[:, 1]
        grouped = torch.cat([own[kept] for own, kept in zip(weights, self.mask, strict=True)])
        conv = self._grouped(self.conv.in_channels, grouped)
        return IndexedReactivation(index, self.norm, self.act, conv)


class IndexedGroups(nn.Module):
    """LearnedGroups after training: chosen channels, then a convolution in groups."""

    index: Tensor

    def __init__(self, index: Tensor, norm: nn.Module, act: nn.Module, conv: nn.Conv2d) -> None:
        super().__init__()
        self.norm, self.act, self.conv = norm, act, conv
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.act(self.norm(x)).index_select(1, self.index))
        return x.unflatten(1, (self.conv.groups, -1)).transpose(1, 2).flatten(1, 2)


class IndexedReactivation(nn.Module):
    """Reactivation after training: a convolution in groups, its outputs added where they belong.

    places: [groups, after], for every output channel what each group adds to it; the last channel
    of all is zero. The authors multiply with a matrix of zeros and ones, which costs more than the
    convolution.
    """

    places: Tensor

    def __init__(self, index: Tensor, norm: nn.Module, act: nn.Module, conv: nn.Conv2d) -> None:
        super().__init__()
        self.norm, self.act, self.conv = norm, act, conv
        number = len(index)
        places = torch.full((conv.groups, number), number, device=index.device)
        group = torch.arange(number, device=index.device) // (number // conv.groups)
        places[group, index] = torch.arange(number, device=index.device)
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        x = self.conv(x.unflatten(1, (-1, self.conv.groups)).transpose(1, 2).flatten(1, 2))
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
        total = x.index_select(1, self.places[0])
        for of_group in self.places[1:]:
            total = total + x.index_select(1, of_group)
        return total


class DenseLayer(nn.Module):
    """Learned groups, a 3x3 convolution in groups, attention; then x [B, C, H, W], reactivated, and
    the new channels [B, growth, H, W] behind it.
    """

    def __init__(
        self, before: int, growth: int, groups: int, is_hard_swish: bool, has_attention: bool
    ) -> None:
        super().__init__()
        middle = _BOTTLENECK * growth
        self.conv1 = LearnedGroups(before, middle, groups, is_hard_swish)
        self.norm2 = nn.BatchNorm2d(middle)
        self.act2 = _activation(is_hard_swish)
        self.conv2 = nn.Conv2d(middle, growth, 3, padding=1, groups=groups, bias=False)
        self.se = (
            SEModule(growth, rd_channels=growth, bias=False) if has_attention else nn.Identity()
        )
        self.reactivation = Reactivation(growth, before, groups, is_hard_swish)

    def forward(self, x: Tensor) -> Tensor:
        new = self.se(self.conv2(self.act2(self.norm2(self.conv1(x)))))
        return torch.cat((x + self.reactivation(new), new), dim=1)


class CondenseNetV2(ZooModel):
    """depths, growths: layers of each stage, and the channels that each of them adds; the stem has
    twice the first. head_width: of the hidden layer before the classifier.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (1, 1, 4, 6, 8),
        growths: tuple[int, ...] = (8, 8, 16, 32, 64),
        groups: int = 8,
        head_width: int = 828,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, head_width, drop_rate)
        width = 2 * growths[0]
        self.conv_stem = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, (depth, growth) in enumerate(zip(depths, growths, strict=True)):
            layers: list[nn.Module] = [nn.AvgPool2d(2)] if i else []
            for _ in range(depth):
                layers.append(DenseLayer(width, growth, groups, i >= 2, has_attention=i >= 3))
                width += growth
            stages.append(nn.Sequential(*layers))
            reduction = 2 ** (i + 1)
            info = {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.se = SEModule(width, rd_channels=width // 16, bias=False)
        self.fc = nn.Linear(width, head_width)
        self.fc_act = nn.Hardswish()
        self.reset_classifier(num_classes)
        for name, module in self.named_modules():
            # the authors' attention is of linear layers, which start as torch starts them; and
            # their reactivation's norms start at one, as the model sets all of them in the end
            if isinstance(module, nn.Conv2d) and ".se." not in f".{name}":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {
            "stem": r"^conv_stem",
            "blocks": [(blocks, None), (r"^norm|^se|^fc", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [B, C, H, W]."""
        return self.act(self.norm(self.stages(self.conv_stem(x))))

    def pool(self, x: Tensor) -> Tensor:
        return self.fc_act(self.fc(self.se(self.global_pool(x)).flatten(1)))


_NAMES = (  # in the authors' code: here
    (r"^features\.init_conv\.", "conv_stem."),
    (r"^features\.norm_last\.", "norm."),
    (r"^features\.se_last\.", "se."),
    (r"^classifier\.", "head."),
    (r"\.conv_1\.", ".conv1."),
    (r"\.conv_2\.norm\.", ".norm2."),
    (r"\.conv_2\.conv\.", ".conv2."),
    (r"\.sfr\.", ".reactivation."),
    (r"(^|\.)se\.fc\.0\.", r"\1se.fc1."),
    (r"(^|\.)se\.fc\.2\.", r"\1se.fc2."),
    (r"\._mask$", ".mask"),
)
_LAYER = re.compile(r"^features\.denseblock_(\d+)\.denselayer_(\d+)\.")


def _ours(name: str) -> str:
    if place := _LAYER.match(name):
        stage, layer = int(place[1]) - 1, int(place[2]) - 1
        # a pooling comes first in all stages but one
        name = f"stages.{stage}.{layer + (stage > 0)}." + name[place.end() :]
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names, in both of their forms: as they are
    trained, and converted, which are pulled apart into masks and weights again. Of channels that no
    group reads a converted file has no norms: they get means of zero and deviations of one.
    """
    assert isinstance(model, CondenseNetV2)
    if "features.init_conv.weight" not in weights:
        return weights
    found = {
        _ours(name): tensor
        for name, tensor in weights.items()
        if not name.endswith(("._count", "._stage"))
    }
    for name, module in model.named_modules():
        if isinstance(module, SEModule):
            for part in (f"{name}.fc1.weight", f"{name}.fc2.weight"):
                found[part] = found[part][:, :, None, None]
        elif isinstance(module, Pruned):
            if f"{name}.index" in found:
                _masked(found, name, module)
            else:
                # alike for all members of a group
                mask = module.by_group(found[f"{name}.mask"][:, :, 0, 0])[:, :, 0]
                found[f"{name}.mask"] = mask > 0.5  # an average's masks are on their way
    return found


def _masked(found: dict[str, Tensor], name: str, module: Pruned) -> None:
    """Change a converted layer among weights to the form that trains."""
    given, index = found[f"{name}.conv.weight"][:, :, 0, 0], found.pop(f"{name}.index")
    weight = torch.zeros_like(module.conv.weight)
    groups = module.by_group(weight[:, :, 0, 0])
    mask = torch.zeros_like(module.mask)
    is_input = isinstance(module, LearnedGroups)
    chosen = (index if is_input else index.argmax(dim=1)).long()
    pairs = zip(given.chunk(module.groups), chosen.chunk(module.groups), strict=True)
    for number, (own, places) in enumerate(pairs):
        groups[number, places] = own.T if is_input else own
        mask[number, places] = True
    found[f"{name}.conv.weight"], found[f"{name}.mask"] = weight, mask
    if is_input:
        for part, tensor in module.norm.state_dict().items():
            if tensor.ndim:
                start = torch.ones_like if part in ("weight", "running_var") else torch.zeros_like
                full = start(tensor)
                full[chosen] = found[f"{name}.norm.{part}"]
                found[f"{name}.norm.{part}"] = full


_SIZES: dict[str, dict[str, Any]] = {
    "a": {
        "depths": (1, 1, 4, 6, 8), "growths": (8, 8, 16, 32, 64), "groups": 8, "head_width": 828,
    },
    "b": {
        "depths": (2, 4, 6, 8, 6), "growths": (6, 12, 24, 48, 96), "groups": 6, "head_width": 1024,
    },
    "c": {
        "depths": (4, 6, 8, 10, 8), "growths": (8, 16, 32, 64, 128), "groups": 8,
        "head_width": 1024,
    },
}  # fmt: skip
register_variants(
    CondenseNetV2,
    {
        f"condensenetv2_{size}": (
            arguments,
            # the authors resize to 256, C by bilinear interpolation
            image_facts(
                first_conv="conv_stem",
                crop_pct=0.875,
                interpolation="bilinear" if size == "c" else "bicubic",
            ),
        )
        for size, arguments in _SIZES.items()
    },
    checkpoint_filter_fn,
)
