"""The plain ViT of big_vision: no class token, fixed positions, mean pooling, a tanh layer before
the classifier.

Source: Beyer, Zhai, Kolesnikov 2022, arXiv:2205.01580; github.com/google-research/big_vision.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import lecun_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainer.models.zoo.common import image_facts, register_variants


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed positions [1, height * width, dim] of a grid, row by row: sine and cosine of the
    column, then of the row, each a quarter of the channels, at wavelengths from 1 to 10,000.

    Source: Chen, Xie, He 2021, arXiv:2104.02057 (MoCo v3).
    """
    rate = 10_000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (place.reshape(-1, 1) * rate for place in (column, row))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1).float()[None]


class PlainViT(VisionTransformer):
    """timm's ViT with what is big_vision's: GELU's tanh form, the last norm before the pooling,
    its first weights (the classifier's are zero). The positions do not train.

    dynamic_img_size: they are computed anew for other sizes of images.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        init_values: float | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, num_classes, "avg", embed_dim, depth, num_heads,
            init_values=init_values, class_token=False, fc_norm=False, act_layer="gelu_tanh",
            dynamic_img_size=dynamic_img_size, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
            weight_init="jax",
        )  # fmt: skip
        height, width = self.patch_embed.grid_size
        positions = sincos_positions(height, width, self.embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.pre_logits = nn.Linear(self.embed_dim, self.embed_dim)
        lecun_normal_(self.pre_logits.weight)
        nn.init.zeros_(self.pre_logits.bias)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^pre_logits", (99999,))],
        }

    def _pos_embed(self, x: Tensor) -> Tensor:
        if not self.dynamic_img_size:
            return super()._pos_embed(x)
        height, width = x.shape[1], x.shape[2]
        assert self.pos_embed is not None
        positions: Tensor = self.pos_embed
        if (height, width) != self.patch_embed.grid_size:
            positions = sincos_positions(height, width, self.embed_dim).to(positions)
        return x.flatten(1, 2) + positions

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] to logits [B, num_classes], or to vectors [B, D] with pre_logits."""
        vectors = self.head_drop(self.pre_logits(self.pool(x)).tanh())
        return vectors if pre_logits else self.head(vectors)


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
_FACTS = image_facts(
    fixed_input_size=True, first_conv="patch_embed.proj", crop_pct=0.875,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
register_variants(
    PlainViT,
    {f"vit_{size}_patch16_plain_224": (arguments, _FACTS) for size, arguments in _SIZES.items()},
)
