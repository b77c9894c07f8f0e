"""T2T-ViT: overlapping patches become tokens in three steps, with light attention between, then a
plain, deep and narrow ViT.

Source: Yuan et al. 2021, arXiv:2101.11986; github.com/yitu-opensource/T2T-ViT.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple, trunc_normal_
from timm.models.vision_transformer import Block
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

_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding
_TOKEN_DIM = 64
_NUM_FEATURES = 32  # random features of the Performer: half the width


class TokenPerformer(nn.Module):
    """Linear attention by positive random features, then an MLP: [B, N, dim] to [B, N, 64].

    exp(q.k) is the mean of f(q) f(k) over features f(x) = exp(w.x - |x|**2 / 2), w [32, 64]
    orthogonal rows of length sqrt(32), which do not train. The skip is from the values v, as the
    input has another width. Features and sums are float32 under autocast.

    Source: Choromanski et al. 2020, arXiv:2009.14794.
    """

    def __init__(self, dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * _TOKEN_DIM)
        self.proj = nn.Linear(_TOKEN_DIM, _TOKEN_DIM)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(_TOKEN_DIM)
        self.mlp = nn.Sequential(
            nn.Linear(_TOKEN_DIM, _TOKEN_DIM),
            nn.GELU(),
            nn.Linear(_TOKEN_DIM, _TOKEN_DIM),
            nn.Dropout(drop),
        )
        rows = nn.init.orthogonal_(torch.empty(_NUM_FEATURES, _TOKEN_DIM))
        self.w = nn.Parameter(rows * math.sqrt(_NUM_FEATURES), requires_grad=False)

    def features(self, x: Tensor) -> Tensor:
        """[B, N, 32] of float32 x [B, N, 64]."""
        half_square = x.square().sum(dim=-1, keepdim=True) / 2
        return (x @ self.w.float().T - half_square).exp() / math.sqrt(_NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        with _in_float32(x):
            of_keys, of_queries = self.features(k.float()), self.features(q.float())
            total = of_queries @ of_keys.sum(dim=1)[:, :, None]
            mixed = of_queries @ (of_keys.transpose(1, 2) @ v.float()) / (total + 1e-8)
        x = v + self.drop(self.proj(mixed.to(v.dtype)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """One head of 64 channels; its scale is dim ** -0.5 of the input's width. Skip from v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * _TOKEN_DIM, bias=False)
        self.proj = nn.Linear(_TOKEN_DIM, _TOKEN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale))


class TokenTransformer(nn.Module):
    """Full attention in place of TokenPerformer: [B, N, dim] to [B, N, 64]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim)
        self.norm2 = nn.LayerNorm(_TOKEN_DIM)
        self.mlp = Mlp(_TOKEN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _in_float32(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast, where the device of x has it: the meta device has none."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class TokensToToken(nn.Module):
    """Images [B, C, H, W] as tokens [B, N, embed_dim], N = H * W / 256."""

    def __init__(self, kind: str, in_chans: int, embed_dim: int, drop: float) -> None:
        super().__init__()
        widths = in_chans * 7 * 7, _TOKEN_DIM * 3 * 3
        self.attention1, self.attention2 = (
            TokenPerformer(dim, drop) if kind == "performer" else TokenTransformer(dim)
            for dim in widths
        )
        self.project = nn.Linear(_TOKEN_DIM * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        for split, layer in zip(
            _SPLITS, (self.attention1, self.attention2, self.project), strict=True
        ):
            kernel, stride, padding = split
            size = _split_size((x.shape[2], x.shape[3]), *split)
            patches = F.unfold(x, kernel, padding=padding, stride=stride)
            tokens = layer(patches.transpose(1, 2))
            x = tokens.transpose(1, 2).unflatten(2, size)
        return tokens


def _split_size(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((px + 2 * padding - kernel) // stride + 1 for px in size)
    return height, width


class T2TViT(ZooModel):
    """img_size: the side of images, which the fixed positions depend on; dynamic_img_size: they are
    computed anew for others. They and the Performers' features are weights that do not train.
    proj_drop_rate: of the Performers alone. The authors train with a drop_path_rate of 0.1.
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
        tokens: Literal["performer", "transformer"] = "performer",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, embed_dim, drop_rate)
        self.num_heads = num_heads
        self.dynamic_img_size = dynamic_img_size
        size = self.img_size = to_2tuple(img_size)
        for split in _SPLITS:
            size = _split_size(size, *split)
        self.tokens = TokensToToken(tokens, in_chans, embed_dim, proj_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sinusoid_positions(1 + size[0] * size[1], embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
                for rate in drop_path_rates(drop_path_rate, depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_classifier(num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^tokens",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + N, C] after the last norm, the class token's first."""
        if not self.dynamic_img_size:
            check_size((x.shape[2], x.shape[3]), self.img_size)
        x = self.tokens(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        positions: Tensor = self.pos_embed
        if x.shape[1] != positions.shape[1]:
            positions = sinusoid_positions(x.shape[1], x.shape[2]).to(positions)
        return self.norm(self.blocks(x + positions))

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0]


_THEIRS = "tokens_to_token."


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' repository under our names, and positions for the model's images.

    Their weights were trained with attention scaled by dim ** -0.5 of the whole width, later code
    and ours scale by a head's width: so their queries are scaled to give the same.
    """
    assert isinstance(model, T2TViT)
    if any(name.startswith(_THEIRS) for name in weights):
        weights = {name.replace(_THEIRS, "tokens."): each for name, each in weights.items()}
        for number in range(len(model.blocks)):
            name = f"blocks.{number}.attn.qkv.weight"
            qkv = weights[name].clone()
            qkv[: len(qkv) // 3] *= model.num_heads**-0.5
            weights[name] = qkv
    return weights | {"pos_embed": model.pos_embed.detach().clone()}


_SIZES: dict[str, dict[str, Any]] = {
    "7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    "24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
}
_FACTS = image_facts(fixed_input_size=True)  # no first_conv: patches are unfolded
register_variants(
    T2TViT,
    {f"t2t_vit_{size}": (arguments, _FACTS) for size, arguments in _SIZES.items()}
    | {
        f"t2t_vit_t_{size}": (_SIZES[size] | {"tokens": "transformer"}, _FACTS)
        for size in ("14", "19", "24")
    },
    checkpoint_filter_fn,
)
