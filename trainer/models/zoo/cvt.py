"""CvT, the convolutional vision transformer: convolutions make the tokens, and queries, keys and
values of them.

Source: Wu et al. 2021, arXiv:2103.15808; github.com/microsoft/CvT.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNormFp32,
    Mlp,
    QuickGELU,
    trunc_normal_,
)
from torch import Tensor, nn

from trainer.models.zoo.common import (
    ZooModel,
    drop_path_rates,
    image_facts,
    init_linear,
    register_variants,
)


def _norm(dim: int) -> nn.LayerNorm:
    return LayerNormFp32(dim, eps=1e-5)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


class ConvProjection(nn.Sequential):
    """A depthwise 3x3 convolution and BatchNorm over a map [B, C, H, W]: tokens [B, N, C]."""

    def __init__(self, dim: int, stride: int) -> None:
        conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim)))

    def forward(self, x: Tensor) -> Tensor:
        return _tokens(super().forward(x))


class ConvAttention(nn.Module):
    """Attention of tokens [B, T + H * W, C], the T class tokens first.

    Queries are of each pixel, keys and values of every second. The scale is dim ** -0.5 of the
    whole width, not of a head's.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = dim**-0.5
        self.conv_proj_q = ConvProjection(dim, stride=1)
        self.conv_proj_k = ConvProjection(dim, stride=2)
        self.conv_proj_v = ConvProjection(dim, stride=2)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        classes, pixels = x.tensor_split((x.shape[1] - size[0] * size[1],), dim=1)
        grid = pixels.transpose(1, 2).unflatten(2, size)
        q, k, v = (
            linear(torch.cat((classes, conv(grid)), dim=1))
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)
            for conv, linear in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class CvtBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = _norm(dim)
        self.attn = ConvAttention(dim, num_heads)
        self.norm2 = _norm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=QuickGELU)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Module):
    """A convolution with overlap, then LayerNorm: tokens [B, H * W, C] and their (H, W)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = _norm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(_tokens(x)), (x.shape[2], x.shape[3])


class CvtStage(nn.Module):
    """Tokens [B, H * W, C] of a map, and its (H, W); with a class token, which comes first, if it
    has one.
    """

    def __init__(
        self, embed: ConvEmbed, dim: int, num_heads: int, rates: Sequence[float], has_class: bool
    ) -> None:
        super().__init__()
        self.patch_embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_class else None
        self.blocks = nn.ModuleList(CvtBlock(dim, num_heads, rate) for rate in rates)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x, size)
        return x, size


class CvT(ZooModel):
    """Three stages, the class token in the last alone; no positions, so any image size.

    drop_path_rate: of the last stage's last block, rising from 0 at that stage's first; the other
    stages drop nothing.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: tuple[int, ...] = (1, 3, 6),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, embed_dims[-1], drop_rate)
        stages, width, last = [], in_chans, len(depths) - 1
        for i, dim in enumerate(embed_dims):
            embed = ConvEmbed(width, dim, *((3, 2, 1) if i else (7, 4, 2)))
            rates = drop_path_rates(drop_path_rate if i == last else 0.0, depths[i])
            stages.append(CvtStage(embed, dim, num_heads[i], rates, has_class=i == last))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.norm = _norm(embed_dims[-1])
        self.reset_classifier(num_classes)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{len(self.stages) - 1}.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        within = [] if coarse else [(r"^stages\.(\d+)\.(?:patch_embed|cls_token)", (0,))]
        return {
            "stem": r"^stages\.0\.patch_embed",
            "blocks": [*within, (blocks, None), (r"^norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + H * W, C] of the last stage, the class token's first."""
        for stage in self.stages:
            x, size = stage(x)
            if stage.cls_token is None:
                x = x.transpose(1, 2).unflatten(2, size)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return self.norm(x[:, 0])


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names: their stage0 is stages.0."""
    return {re.sub(r"^stage(\d+)\.", r"stages.\1.", name): weights[name] for name in weights}


_FACTS: dict[str, Any] = {"first_conv": "stages.0.patch_embed.proj", "crop_pct": 0.875}
register_variants(
    CvT,
    {
        "cvt_13": ({}, image_facts(**_FACTS)),
        "cvt_13_384": ({}, image_facts(384, **_FACTS | {"crop_pct": 1.0})),
        "cvt_21": ({"depths": (1, 4, 16)}, image_facts(**_FACTS)),
    },
    checkpoint_filter_fn,
)
