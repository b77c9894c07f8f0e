"""timm's ViT for images of 32 px, such as CIFAR's: 64 patches of 4 px.

Source: Dosovitskiy et al. 2020, arXiv:2010.11929; the widths of Touvron et al. 2020,
arXiv:2012.12877 (tiny), and smaller ones of our own for studies in minutes of a CPU (micro).
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from trainer.models.zoo.common import image_facts, register_variants

__all__ = ["SmallViT", "checkpoint_filter_fn"]


class SmallViT(VisionTransformer):
    """timm's own, whose variants have larger patches."""


def _variant(width: int, depth: int, num_heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = {
        "img_size": 32, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": num_heads,
    }  # fmt: skip
    fixed = {"fixed_input_size": True, "first_conv": "patch_embed.proj"}
    return arguments, image_facts(32, num_classes=10, crop_pct=1.0, **fixed)


register_variants(
    SmallViT,
    {"vit_tiny_patch4_32": _variant(192, 12, 3), "vit_micro_patch4_32": _variant(64, 4, 4)},
    checkpoint_filter_fn,  # type: ignore[arg-type]  # of this class alone
)
