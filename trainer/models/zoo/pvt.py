"""PVT, the pyramid vision transformer, first version: attention to a map that is made smaller.

Source: Wang et al. 2021, arXiv:2102.12122; github.com/whai362/PVT. timm has its second version.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from trainer.models.zoo.common import (
    ZooModel,
    drop_path_rates,
    image_facts,
    init_linear,
    register_variants,
)


class PvtBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: int, sr_ratio: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches side by side, then LayerNorm: tokens [B, H * W, C] and their (H, W)."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class PvtStage(nn.Module):
    """Tokens of a map and its (H, W); with a class token, which comes first, if it has one.

    grid: the (H, W) that learned positions are for; they are interpolated to another.
    """

    def __init__(
        self, embed: PatchEmbed, blocks: Sequence[PvtBlock], dim: int, grid: tuple[int, int],
        has_class: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.patch_embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_class else None
        self.pos_embed = nn.Parameter(torch.zeros(1, has_class + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(blocks)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Those of a map of another size, bilinear; the class token's is kept."""
        if size == self.grid:
            return self.pos_embed
        first = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        own, grid = self.pos_embed.tensor_split((first,), dim=1)
        grid = grid.transpose(1, 2).unflatten(2, self.grid)
        grid = F.interpolate(grid, size, mode="bilinear")
        return torch.cat((own, grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(size)
        for block in self.blocks:
            x = block(x, size)
        return x, size


class PVT(ZooModel):
    """Four stages, the class token in the last alone. img_size: the side of the images that the
    learned positions are for; they are interpolated for others.

    In the source positions decay and the class token does not.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, embed_dims[-1], drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        height, wide = to_2tuple(img_size)
        stages, width = [], in_chans
        for i, dim in enumerate(embed_dims):
            patch = 2 if i else 4
            height, wide = height // patch, wide // patch
            blocks = [
                PvtBlock(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], next(rates))
                for _ in range(depths[i])
            ]
            has_class = i == len(depths) - 1
            embed = PatchEmbed(width, dim, patch)
            stages.append(PvtStage(embed, blocks, dim, (height, wide), has_class))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.reset_classifier(num_classes)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{len(self.stages) - 1}.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        own = r"^stages\.(\d+)\.(?:patch_embed|cls_token|pos_embed)"
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": [*([] if coarse else [(own, (0,))]), (blocks, None), (r"^norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + H * W, C] after the last norm, the class token's first."""
        for stage in self.stages:
            x, size = stage(x)
            if stage.cls_token is None:
                x = x.transpose(1, 2).unflatten(2, size)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0]


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names: their block1 is stages.0.blocks."""
    last = sum(name.startswith("pos_embed") for name in weights) - 1

    def ours(name: str) -> str:
        if name == "cls_token":
            return f"stages.{last}.cls_token"
        found = re.match(r"(patch_embed|pos_embed|block)(\d)(.*)", name)
        if found is None:
            return name
        kind, number, rest = found.groups()
        return f"stages.{int(number) - 1}.{kind.replace('block', 'blocks')}{rest}"

    return {ours(name): tensor for name, tensor in weights.items()}


_DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
register_variants(
    PVT,
    {
        name: ({"depths": depths}, image_facts(first_conv="stages.0.patch_embed.proj"))
        for name, depths in _DEPTHS.items()
    },
    checkpoint_filter_fn,
)
