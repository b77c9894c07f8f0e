"""The whole body of a ConvNeXt, rebuilt as one stage of constant width and resolution."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field
from timm.layers import ClassifierHead, NormMlpClassifierHead
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import nn

from trainer.models.edit.insertion import init_like_timm
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    input_channels,
    replace_module,
)
from trainer.models.parts.bodies import BlockCount


class IsotropicBody(Part):
    """One stage of ConvNeXt blocks after a stem of large patches: an isotropic ConvNeXt.

    depth, width: blocks, and channels of stem and blocks. patch_px: kernel and stride of the stem's
    one convolution, which has no norm after it. layer_scale: initial value of each block's gamma;
    absent, blocks have none, whatever timm gives the model.

    Blocks, norms and activations are of the model's own kind, as in its first stage, and the head
    is the model's own over `width` channels. All weights are initialized anew by timm's rule.
    drop_path grows from 0 at the first block to the model's rate at the last.

    Raises ReplacementError for a model other than a ConvNeXt.
    Source: Liu et al. 2022, arXiv:2201.03545, section 3.3.
    """

    example: ClassVar[dict[str, Any]] = {"depth": 18, "width": 384, "patch_px": 16}
    depth: BlockCount
    width: BlockCount
    patch_px: Annotated[int, Field(ge=1, le=64)]
    layer_scale: Annotated[float, Field(gt=0, lt=1)] | None = None

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Rebuild a ConvNeXt as one stage after one patchify convolution."""
        convnext, old = _blocks(model)
        channels, kind = input_channels(model), old[0]
        has_bias = kind.conv_dw.bias is not None
        convnext.stem = nn.Sequential(
            nn.Conv2d(channels, self.width, self.patch_px, self.patch_px, bias=has_bias)
        )
        convnext.stages = nn.Sequential(self._stage(kind, _drop_path(old)))
        convnext.feature_info = [
            {"num_chs": self.width, "reduction": self.patch_px, "module": "stages.0"}
        ]
        _fit_head(convnext, self.width)
        init_like_timm(model, model)
        places = tuple(f"stages.0.blocks.{number}" for number in range(self.depth))
        note = f"one stage of {self.width} channels, patches of {self.patch_px} px"
        return Replacement(
            "isotropic", counted(old), f"{self.depth} {type(kind).__name__}", places, note
        )

    def _stage(self, kind: ConvNeXtBlock, drop_path: float) -> nn.Module:
        norm = _like(kind.norm)
        layer_scale: Any = self.layer_scale  # timm declares float, and takes None for none
        return ConvNeXtStage(
            self.width, self.width, kind.conv_dw.kernel_size[0], stride=1, depth=self.depth,
            drop_path_rates=[
                drop_path * number / max(self.depth - 1, 1) for number in range(self.depth)
            ],
            ls_init_value=layer_scale, conv_mlp=kind.use_conv_mlp,
            conv_bias=kind.conv_dw.bias is not None, use_grn=hasattr(kind.mlp, "grn"),
            act_layer=type(kind.mlp.act), norm_layer=norm, norm_layer_cl=norm,
        )  # fmt: skip


def _blocks(model: nn.Module) -> tuple[ConvNeXt, list[ConvNeXtBlock]]:
    """The blocks of a ConvNeXt; any other model is rejected."""
    if not isinstance(model, ConvNeXt):
        found = f"{type(model).__name__} is not a timm ConvNeXt"
        raise ReplacementError(
            f"model.isotropic: {found}; use model=convnext_small, or leave model.isotropic out"
        )
    modules = model.stages.modules()
    return model, [module for module in modules if isinstance(module, ConvNeXtBlock)]


def _drop_path(blocks: list[ConvNeXtBlock]) -> float:
    """The largest drop-path rate of any block."""
    return max(getattr(block.drop_path, "drop_prob", 0.0) for block in blocks)


def _like(norm: nn.Module) -> partial[nn.Module]:
    """Builds norms of the same kind for a given number of channels."""
    return partial(type(norm), eps=norm.eps)


def _fit_head(model: ConvNeXt, width: int) -> None:
    """Replace the head by one of the same kind for `width` channels: norm and classifier."""
    old: ClassifierHead | NormMlpClassifierHead = model.head
    alike: dict[str, Any] = {"pool_type": old.global_pool.pool_type, "drop_rate": old.drop.p}
    if isinstance(old, NormMlpClassifierHead):
        alike |= {
            "hidden_size": old.hidden_size,
            "norm_layer": _like(old.norm),
            "act_layer": "gelu",
        }
        replace_module(model, "head", NormMlpClassifierHead(width, model.num_classes, **alike))
    else:
        model.norm_pre = _like(model.norm_pre)(width)
        model.head = ClassifierHead(width, model.num_classes, **alike)
    model.num_features, model.head_hidden_size = width, model.head.num_features
