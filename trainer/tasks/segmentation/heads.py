"""Heads: from the feature maps of a backbone to the scores of each pixel's classes."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainer.base.component import Component

Channels = Annotated[int, Field(ge=1, le=8192)]
DropShare = Annotated[float, Field(ge=0, lt=1)]


class Head(Component):
    """Builds the module of a head."""

    kind: ClassVar[str] = "head"

    @abstractmethod
    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        """A module from feature maps [B, channels[i], h_i, w_i], the finest first, to scores [B,
        num_classes, h, w] of one of their sizes. Draws from torch's global generator.
        """


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] at another (height, width): bilinear, corners as pixels' areas."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _convolved(before: int, after: int, size: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    padding = dilation * (size // 2)
    convolution = nn.Conv2d(before, after, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class _Pooled(nn.Module):
    """Maps, averaged into bins x bins, convolved, and resized to what they were."""

    def __init__(self, before: int, after: int, bins: int) -> None:
        super().__init__()
        self.pool, self.convolved = nn.AdaptiveAvgPool2d(bins), _convolved(before, after)

    def forward(self, maps: Tensor) -> Tensor:
        return resized(self.convolved(self.pool(maps)), maps.shape[-2:])


class _Beside(nn.Module):
    """What several branches make of the same maps, one beside the other."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.branches], 1)


class _OfLast(nn.Sequential):
    """Modules in turn, of the last feature maps alone. place: of those, counted from the end."""

    def __init__(self, *modules: nn.Module, place: int = -1) -> None:
        super().__init__(*modules)
        self.place = place

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward(features[self.place])


class DeepLabV3(Head):
    """Atrous spatial pyramid pooling: beside a 1 x 1 convolution dilated ones and the mean of all.

    rates: dilations, for output stride 16 half of those for 8. channels: of each branch. dropout:
    share of the branches' joined maps that is left out in training.

    Source: Chen et al. 2017, arXiv:1706.05587; torchvision's DeepLabHead, to the same numbers with
    its weights.
    """

    name: Literal["deeplab_v3"] = "deeplab_v3"
    rates: Annotated[tuple[Annotated[int, Field(ge=1, le=96)], ...], Field(min_length=1)]
    channels: Channels
    dropout: DropShare
    example: ClassVar[dict[str, Any]] = {"rates": (12, 24, 36), "channels": 256, "dropout": 0.5}

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        before, each = channels[-1], self.channels
        branches = [
            _convolved(before, each),
            *(_convolved(before, each, 3, rate) for rate in self.rates),
            _Pooled(before, each, 1),
        ]
        return _OfLast(
            _Beside(branches),
            _convolved(each * len(branches), each),
            nn.Dropout(self.dropout),
            _convolved(each, each, 3),
            nn.Conv2d(each, num_classes, 1),
        )


class PyramidPooling(Head):
    """The maps themselves beside their means over grids of several sizes.

    bins: of each grid's side. channels: of the convolution that joins them. dropout: of its maps.

    Source: Zhao et al. 2016, arXiv:1612.01105 (PSPNet).
    """

    name: Literal["psp"] = "psp"
    bins: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)]
    channels: Channels
    dropout: DropShare
    example: ClassVar[dict[str, Any]] = {"bins": (1, 2, 3, 6), "channels": 512, "dropout": 0.1}

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        before = channels[-1]
        each = max(1, before // len(self.bins))
        branches = [nn.Identity(), *(_Pooled(before, each, bins) for bins in self.bins)]
        return _OfLast(
            _Beside(branches),
            _convolved(before + each * len(self.bins), self.channels, 3),
            nn.Dropout2d(self.dropout),
            nn.Conv2d(self.channels, num_classes, 1),
        )


class AllMlp(Head):
    """A linear layer for each feature map, all resized to the finest and joined by another.

    channels: of each. dropout: share of the joined maps that is left out in training.

    Source: Xie et al. 2021, arXiv:2105.15203 (SegFormer), whose code joins the coarsest first.
    """

    name: Literal["segformer"] = "segformer"
    channels: Channels
    dropout: DropShare
    example: ClassVar[dict[str, Any]] = {"channels": 256, "dropout": 0.1}

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        return _AllMlp(channels, self.channels, self.dropout, num_classes)


class _AllMlp(nn.Module):
    def __init__(
        self, channels: Sequence[int], each: int, dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(before, each, 1) for before in channels)
        self.joined = _convolved(each * len(channels), each)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(each, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        maps = [resized(layer(one), size) for layer, one in zip(self.layers, features, strict=True)]
        return self.classifier(self.dropout(self.joined(torch.cat(maps[::-1], 1))))


class RefineNet(Head):
    """Multi-path refinement: each map, the coarsest first, joined to what is refined so far.

    A map is convolved and goes through two residual units; it and what comes from the coarser ones
    are convolved, resized to its size and added; then chained pooling and three more residual
    units.

    channels: of every path but that of the coarsest map, which has coarsest_channels. num_pools: of
    each chain. dropout: share of the two coarsest maps and of the last one that is left out in
    training.

    Source: Lin et al. 2016, arXiv:1611.06612; numbers of units, biases and dropout as in
    guosheng/refinenet (My_net_util.m, gen_network_refine_group.m, do_gen_block of
    gen_network_pool_block.m).
    """

    name: Literal["refinenet"] = "refinenet"
    channels: Channels
    coarsest_channels: Channels
    num_pools: Annotated[int, Field(ge=1, le=16)]
    dropout: DropShare
    example: ClassVar[dict[str, Any]] = {
        "channels": 256,
        "coarsest_channels": 512,
        "num_pools": 4,
        "dropout": 0.5,
    }

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        return _RefineNet(self, channels, num_classes)


class _RefineNet(nn.Module):
    def __init__(self, head: RefineNet, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        of_paths = [head.channels] * (len(channels) - 1) + [head.coarsest_channels]
        self.dropout = nn.Dropout(head.dropout)
        self.adapted = nn.ModuleList(
            nn.Sequential(_plain(before, each), _ResidualUnit(each), _ResidualUnit(each))
            for before, each in zip(channels, of_paths, strict=True)
        )
        self.own = nn.ModuleList(_plain(each, each) for each in of_paths[:-1])
        self.coarser = nn.ModuleList(
            _plain(before, each) for each, before in itertools.pairwise(of_paths)
        )
        self.refined = nn.ModuleList(
            nn.Sequential(
                _ChainedPooling(each, head.num_pools), *(_ResidualUnit(each) for _ in range(3))
            )
            for each in of_paths
        )
        self.classifier = _plain(of_paths[0], num_classes, bias=True)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        last = len(features) - 1
        refined = self.refined[last](self.adapted[last](self.dropout(features[last])))
        for place in reversed(range(last)):
            maps = features[place] if place < last - 1 else self.dropout(features[place])
            maps = self.own[place](self.adapted[place](maps))
            maps = maps + resized(self.coarser[place](refined), maps.shape[-2:])
            refined = self.refined[place](maps)
        return self.classifier(self.dropout(refined))


class _ResidualUnit(nn.Module):
    """The maps and two convolutions of them, a ReLU before each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _plain(channels, channels, bias=True), _plain(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.second(self.first(maps.relu()).relu())


class _ChainedPooling(nn.Module):
    """The sum of the maps, after a ReLU, and of all that a chain of poolings makes of them, each of
    the largest in 5 x 5 and a convolution.
    """

    def __init__(self, channels: int, number: int) -> None:
        super().__init__()
        self.chain = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(5, 1, padding=2), _plain(channels, channels))
            for _ in range(number)
        )

    def forward(self, maps: Tensor) -> Tensor:
        found = part = maps.relu()
        for link in self.chain:
            part = link(part)
            found = found + part
        return found


def _plain(before: int, after: int, bias: bool = False) -> nn.Conv2d:
    """A 3 x 3 convolution."""
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


class Fcn(Head):
    """Two convolutions of the last maps.

    dropout: of the maps between them.

    Source: Long et al. 2014, arXiv:1411.4038; torchvision's FCNHead: a quarter of the channels.
    """

    name: Literal["fcn"] = "fcn"
    dropout: DropShare
    example: ClassVar[dict[str, Any]] = {"dropout": 0.1}

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        return fcn(channels, num_classes, self.dropout)


def fcn(channels: Sequence[int], num_classes: int, dropout: float, place: int = -1) -> nn.Module:
    """torchvision's FCNHead of the feature maps at a place."""
    before = channels[place]
    each = max(1, before // 4)
    return _OfLast(
        _convolved(before, each, 3),
        nn.Dropout(dropout),
        nn.Conv2d(each, num_classes, 1),
        place=place,
    )
