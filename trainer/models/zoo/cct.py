"""CCT, the compact convolutional transformer: a small ViT on tokens of convolutions.

Source: Hassani et al. 2021, arXiv:2104.05704; github.com/SHI-Labs/Compact-Transformers.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from timm.layers import (
    Attention,
    DropPath,
    Mlp,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from torch import Tensor, nn

from trainer.models.zoo.common import (
    ZooModel,
    check_size,
    drop_path_rates,
    image_facts,
    init_linear,
    register_variants,
    sinusoid_positions,
)


class CctBlock(nn.Module):
    """Attention and MLP around x [B, N, C].

    The second norm replaces the stream itself, not only the branch's input: x = norm2(x +
    attn(norm1(x))), then x + mlp(x). So the authors' code has it.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=False, attn_drop=attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(x))


class ConvLayer(nn.Module):
    """Convolution, ReLU and max pooling: one layer of the tokenizer."""

    def __init__(self, in_chans: int, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, max(1, kernel // 2 - 1)
        self.conv = nn.Conv2d(in_chans, width, kernel, self.stride, kernel // 2, bias=False)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.conv(x)))

    def output_px(self, px: int) -> int:
        """The side of its output for images of px."""
        after = (px + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return (after - 1) // 2 + 1


class CCT(ZooModel):
    """img_size: the side of images, which learned and fixed positions depend on; dynamic_img_size:
    they are interpolated for others. sine: fixed positions, which do not train. attn_drop_rate: 0.1
    in the authors' models; they train with a drop_path_rate of 0.1. Tokens are pooled with learned
    weights, without a class token.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        kernel_size: int = 3,
        num_convs: int = 1,
        sine: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, embed_dim, drop_rate)
        self.img_size = to_2tuple(img_size)
        self.dynamic_img_size = dynamic_img_size
        widths = [in_chans] + [64] * (num_convs - 1) + [embed_dim]
        layers = [ConvLayer(before, after, kernel_size) for before, after in pairwise(widths)]
        self.tokenizer = nn.Sequential(*layers)
        self.grid = self.img_size
        for layer in layers:
            self.grid = (layer.output_px(self.grid[0]), layer.output_px(self.grid[1]))
        positions = sinusoid_positions(self.grid[0] * self.grid[1], embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=not sine)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *(CctBlock(embed_dim, num_heads, mlp_ratio, attn_drop_rate, rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.attention_pool = nn.Linear(embed_dim, 1)
        self.reset_classifier(num_classes)
        if not sine:
            trunc_normal_(self.pos_embed, std=0.2)  # 0.2, not the usual 0.02
        self.apply(init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^pos_embed|^tokenizer",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^attention_pool", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] after the last norm."""
        if not self.dynamic_img_size:
            check_size((x.shape[2], x.shape[3]), self.img_size)
        x = self.tokenizer(x)
        grid, positions = (x.shape[2], x.shape[3]), self.pos_embed
        if grid != self.grid:
            positions = resample_abs_pos_embed(positions, list(grid), list(self.grid), 0)
        return self.norm(self.blocks(x.flatten(2).transpose(1, 2) + positions))

    def pool(self, x: Tensor) -> Tensor:
        weights = self.attention_pool(x).softmax(dim=1)
        return (weights.transpose(1, 2) @ x).squeeze(1)


_NAMES = (  # in the authors' code: here
    (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"tokenizer.\1.conv."),
    (r"^classifier\.", ""),
    (r"^positional_emb$", "pos_embed"),
    (r"\.norm1\.", ".norm2."),  # before pre_norm takes its name
    (r"\.pre_norm\.", ".norm1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^fc\.", "head."),
)


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names, positions resized to the model's images;
    ours are only resized.
    """
    assert isinstance(model, CCT)
    if "classifier.fc.weight" in weights:
        renamed = {}
        for name, tensor in weights.items():
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
        weights = renamed
    positions = weights.get("pos_embed")
    if positions is not None and positions.shape != model.pos_embed.shape:
        resized = resample_abs_pos_embed(positions, list(model.grid), num_prefix_tokens=0)
        weights = weights | {"pos_embed": resized}
    return weights


_SIZES: dict[int, dict[str, Any]] = {
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}
_CIFAR: dict[str, Any] = {  # CIFAR-10's, as in the authors' configs/datasets/cifar10.yml
    "num_classes": 10, "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip
_FLOWERS: dict[str, Any] = {  # Flowers-102's, as in configs/datasets/flowers102.yml
    "num_classes": 102, "crop_pct": 1.0,
    "mean": (0.4353, 0.3773, 0.2872), "std": (0.2966, 0.2455, 0.2698),
}  # fmt: skip


def _variant(
    size: int, kernel: int, num_convs: int, px: int, sine: bool = False, **facts: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = _SIZES[size] | {
        "img_size": px, "kernel_size": kernel, "num_convs": num_convs, "sine": sine,
    }  # fmt: skip
    fixed = {"fixed_input_size": True, "first_conv": "tokenizer.0.conv"}
    return arguments, image_facts(px, **fixed, **facts)


_SMALL = ((2, 2), (4, 2), (6, 1), (6, 2), (7, 1), (7, 2))  # size, convolutions
register_variants(
    CCT,
    {
        f"cct_{size}_3x{num_convs}_32{'_sine' * sine}": _variant(
            size, 3, num_convs, 32, sine, **_CIFAR
        )
        for size, num_convs in _SMALL
        for sine in (False, True)
    }
    | {
        "cct_7_7x2_224": _variant(7, 7, 2, 224, **_FLOWERS),
        "cct_7_7x2_224_sine": _variant(7, 7, 2, 224, True, **_FLOWERS),
        "cct_14_7x2_224": _variant(14, 7, 2, 224),
        "cct_14_7x2_384": _variant(14, 7, 2, 384),
    },
    checkpoint_filter_fn,
)
