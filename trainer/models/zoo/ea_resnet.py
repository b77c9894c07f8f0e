"""Evolving attention in a ResNet: an eighth of the channels of its 3x3 convolutions are attention,
whose logits a convolution carries on from block to block.

Source: Wang et al. 2021, arXiv:2102.12895; github.com/pkuyym/EvolvingAttention, EAResnet50 (of
TensorFlow 1). Neither gives a score or a size of this network that could be checked, so no recipe
is for it; the tests hold its arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from trainer.models.zoo.common import ZooModel, check_size, image_facts, register_variants

_NUM_HEADS = 8
_KEY_SHARE, _VALUE_SHARE = 4, 8  # of the channels, as 1 / n
_CARRIED = 0.5  # of the logits before, among those that are convolved


def _norm(num_channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(num_channels, momentum=0.003)


class EvolvingConv(nn.Module):
    """A 3x3 convolution beside self-attention over a map of side x side: x [B, C, H, W] and the
    logits before, [B, heads, side ** 2, side ** 2] or None, to both anew.

    The convolution gives 7/8 of the C outputs, attention what is left, with positions that are
    relative on each axis. Logits L are carried on as relu(conv((L + before) / 2)), a 3x3
    convolution of the heads over queries and keys. is_pooled: attention sees the map pooled to half
    its side, and its output is interpolated. The first of a chain has no logits before.

    The authors' code has alpha at 1: what is convolved has no way around the convolution.
    """

    def __init__(
        self, num_channels: int, side: int, stride: int, is_pooled: bool, is_first: bool
    ) -> None:
        super().__init__()
        self.stride, self.is_pooled = stride, is_pooled
        self.key_dim, self.value_dim = num_channels // _KEY_SHARE, num_channels // _VALUE_SHARE
        own = num_channels - self.value_dim
        self.conv = nn.Conv2d(num_channels, own, 3, stride, 1, bias=False)
        self.kqv = nn.Conv2d(num_channels, 2 * self.key_dim + self.value_dim, 1)
        self.out = nn.Conv2d(self.value_dim, self.value_dim, 1)
        dim = self.key_dim // _NUM_HEADS
        self.rows = nn.Parameter(torch.empty(2 * side - 1, dim))
        self.columns = nn.Parameter(torch.empty(2 * side - 1, dim))
        self.evolve = None if is_first else nn.Conv2d(_NUM_HEADS, _NUM_HEADS, 3, padding=1)
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=dim**-0.5)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        convolved = self.conv(x)
        for _ in range((self.stride == 2) + self.is_pooled):
            x = F.avg_pool2d(x, 3, 2, ceil_mode=True)  # no padding before, none counted behind
        height, width = x.shape[2:]
        k, q, v = self.kqv(x).split((self.key_dim, self.key_dim, self.value_dim), dim=1)
        q, k, v = (
            one.unflatten(1, (_NUM_HEADS, -1)).flatten(3).transpose(2, 3) for one in (q, k, v)
        )
        q = q * q.shape[3] ** -0.5
        logits = q @ k.transpose(2, 3) + self._positions(q, height, width)
        if before is not None and self.evolve is not None:
            mixed = (1 - _CARRIED) * logits + _CARRIED * before
            logits = F.relu(self.evolve(mixed))
        attended = logits.softmax(dim=3) @ v
        attended = self.out(attended.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))
        if self.is_pooled:
            attended = _doubled(_doubled(attended).transpose(2, 3)).transpose(2, 3)
        return torch.cat((convolved, attended), dim=1), logits

    def _positions(self, q: Tensor, height: int, width: int) -> Tensor:
        """What q [B, heads, H * W, D] makes of the distances of pixels, as logits."""
        q = q.unflatten(2, (height, width))
        columns = self.columns[_distances(width, q.device)]  # [W, W, D]
        of_columns = torch.einsum("bnhwd,wvd->bnhwv", q, columns)
        of_rows = torch.einsum("bnhwd,hgd->bnhwg", q, self.rows[_distances(height, q.device)])
        total = of_rows[..., :, None] + of_columns[..., None, :]
        return total.flatten(4, 5).flatten(2, 3)


def _distances(side: int, device: torch.device) -> Tensor:
    """[side, side]: key - query, from 0 for the farthest before."""
    places = torch.arange(side, device=device)
    return places[None, :] - places[:, None] + side - 1


def _doubled(x: Tensor) -> Tensor:
    """Twice the last axis: values, and between them their means; the last stands twice. TensorFlow
    1's bilinear interpolation.
    """
    following = torch.cat((x[..., 1:], x[..., -1:]), dim=-1)
    return torch.stack((x, (x + following) / 2), dim=-1).flatten(-2)


class EvolvingBottleneck(nn.Module):
    """1x1, EvolvingConv (or 3x3), 1x1, beside a shortcut: (x, logits) to the same."""

    def __init__(
        self, before: int, middle: int, stride: int, conv2: nn.Module, is_first: bool
    ) -> None:
        super().__init__()
        after = 4 * middle
        self.conv1 = nn.Conv2d(before, middle, 1, bias=False)
        self.bn1 = _norm(middle)
        self.act1 = nn.ReLU()
        self.conv2 = conv2
        self.bn2 = _norm(middle)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(middle, after, 1, bias=False)
        self.bn3 = _norm(after)
        self.act3 = nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(after))
            if is_first
            else nn.Identity()
        )

    def forward(self, x: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = self.act1(self.bn1(self.conv1(x)))
        if isinstance(self.conv2, EvolvingConv):
            out, logits = self.conv2(out, logits)
        else:
            out = self.conv2(out)
        out = self.bn3(self.conv3(self.act2(self.bn2(out))))
        return self.act3(out + self.downsample(x)), logits


class Stage(nn.ModuleList):
    def forward(self, x: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self:
            x, logits = block(x, logits)
        return x, logits


class EAResNet(ZooModel):
    """img_size: the side of images, a multiple of 32, which relative positions depend on. Two
    chains of logits: through stages 2 and 3, both at a sixteenth of the images' side, and stage 4.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, int, int, int] = (3, 4, 6, 3),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, 2048, drop_rate)
        self.img_size = to_2tuple(img_size)
        if self.img_size[0] % 32 or self.img_size[0] != self.img_size[1]:
            raise ValueError(f"img_size {img_size} is no multiple of 32 on both sides")
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = _norm(64)
        self.act1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)  # TensorFlow's SAME: padded behind alone
        before = 64
        for stage, depth in enumerate(depths):
            middle, blocks = 64 * 2**stage, []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                conv2: nn.Module = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
                if stage:
                    side = self.img_size[0] // (32 if stage == 3 else 16)
                    is_first = block == 0 and stage != 2
                    conv2 = EvolvingConv(middle, side, stride, stage == 1, is_first)
                blocks.append(EvolvingBottleneck(before, middle, stride, conv2, not block))
                before = 4 * middle
            self.add_module(f"layer{stage + 1}", Stage(blocks))
        self.feature_info = [
            {"num_chs": 256 * 2**i, "reduction": 4 * 2**i, "module": f"layer{i + 1}"}
            for i in range(4)
        ]
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        self.apply(_init)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|^bn1", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [B, C, H, W]."""
        check_size((x.shape[2], x.shape[3]), self.img_size)
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        logits: Tensor | None = None
        for number in range(1, 5):
            if number == 4:
                logits = None  # of another map
            x, logits = self.get_submodule(f"layer{number}")(x, logits)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return self.global_pool(x).flatten(1)


def _init(module: nn.Module) -> None:
    """TensorFlow's: convolutions of variance 1 / inputs, truncated at two deviations."""
    if isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        std = math.sqrt(1 / fan_in) / 0.87962566103423978  # what truncation leaves of it
        trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


register_variants(
    EAResNet,
    {
        "ea_resnet50": (
            {},
            image_facts(
                first_conv="conv1",
                crop_pct=0.875,
                interpolation="bilinear",
                fixed_input_size=True,
                # the authors subtract means and do not divide
                std=(1 / 255, 1 / 255, 1 / 255),
            ),
        )
    },
)
