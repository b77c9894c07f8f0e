"""What the models of this folder share: registration with timm, a classifier, first weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def image_facts(px: int = 224, **others: Any) -> dict[str, Any]:
    """timm's facts of a model: how images of px pixels are shown to it, its classifier's name."""
    return {
        "num_classes": 1000, "input_size": (3, px, px), "crop_pct": 0.9,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "classifier": "head", **others,
    }  # fmt: skip


def register_variants(
    model: type[nn.Module],
    variants: Mapping[str, tuple[dict[str, Any], dict[str, Any]]],
    convert: Filter | None = None,
) -> None:
    """Register variants of a model with timm: by name, arguments of its class and image facts.

    convert: from the names of its authors' weights to ours. They are defined in the module of the
    class, as `default_cfgs` is, so that timm lists them by family.
    """
    facts = generate_default_cfgs({name: facts for name, (_, facts) in variants.items()})
    sys.modules[model.__module__].default_cfgs = facts  # type: ignore[attr-defined]
    for name, (arguments, _) in variants.items():
        register_model(_entrypoint(model, name, arguments, convert))


def _entrypoint(
    model: type[nn.Module], name: str, arguments: dict[str, Any], convert: Filter | None
) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            model, name, pretrained, pretrained_filter_fn=convert, **arguments | options
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = model.__module__  # where timm looks for the facts
    return build


class ZooModel(nn.Module):
    """A model with a linear classifier `head` over num_features, as timm's are used. A class makes
    its classifier last, with reset_classifier, so that it is the last of its weights.

    Images [B, in_chans, H, W]; forward_features gives a map or tokens, forward_head the logits
    [B, num_classes] of them, pre_logits the vectors [B, num_features] before the classifier.
    drop_rate: of the dropout before it.
    """

    head_has_bias: ClassVar[bool] = True

    def __init__(self, in_chans: int, num_features: int, drop_rate: float) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = nn.Dropout(drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to what `pool` makes vectors of, as timm's models have it."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """The vectors [B, num_features] of features."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits [B, num_classes], or to vectors [B, num_features] with pre_logits."""
        vectors = self.head_drop(self.pool(x))
        return vectors if pre_logits else self.head(vectors)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer, which has the classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; without classes none. The pooling is the model's own."""
        self.num_classes = num_classes
        self.head: nn.Module = (
            nn.Linear(self.num_features, num_classes, bias=self.head_has_bias)
            if num_classes > 0
            else nn.Identity()
        )

    def no_weight_decay(self) -> set[str]:
        """Weights that do not decay in the source beside vectors and biases."""
        return set()


def init_linear(module: nn.Module) -> None:
    """Linear layers truncated normal with a deviation of 0.02, biases zero; others as torch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(last: float, num_blocks: int) -> list[float]:
    """A rate for each block, rising from 0 to `last` in equal steps."""
    return [last * i / max(num_blocks - 1, 1) for i in range(num_blocks)]


def sinusoid_positions(num_positions: int, width: int) -> Tensor:
    """Fixed positions [1, num_positions, width]: channels 2i and 2i + 1 are sine and cosine of
    position / 10000 ** (2i / width).

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    pair = torch.arange(width) // 2 * 2
    angle = position / 10000 ** (pair.double() / width)
    odd = torch.arange(width) % 2 == 1
    return torch.where(odd, angle.cos(), angle.sin()).float()[None]


def check_size(given: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises ValueError for images of another size than the position embeddings are for."""
    if given != expected:
        raise ValueError(
            f"its position embeddings are for images of {expected[0]}x{expected[1]} px "
            f"(img_size={expected[0]}), not {given[0]}x{given[1]}"
        )
