"""Stochastic depth, DropBlock and layer scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from timm.layers import DropPath, LayerScale2d
from torch import Tensor, nn
from torch.nn import functional

from trainer.models.edit.insertion import (
    add_to_branch_end,
    append_module,
    before_last_convolution,
    branch_calls,
    branch_ends,
    branch_middles,
    check_inserted,
    last_stages,
    output_shapes,
)
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    is_norm,
    replace_module,
    starts_at_zero,
)
from trainer.models.edit.stages import blocks

# timm's transformer blocks have two residual branches, each with a module of its own at its end
_OF_TRANSFORMERS = ("drop_path1", "drop_path2")


class StochasticDepth(Part):
    """How the recipe's drop_path drops residual branches: `model.stochastic_depth`.

    over_depth: `linear`, block i of n drops at rate * i / (n - 1), which is timm's rule and starts
    at zero; `constant`, every block at the rate. per: `sample`, each image for itself (timm's), or
    `batch`, all images of a micro-batch together (the paper's). Kept branches are scaled
    up, so evaluation needs no factor.

    Raises ReplacementError where the recipe has no drop_path, and for models in which timm drops
    something else. Source: Huang et al. 2016, arXiv:1603.09382.
    """

    example: ClassVar[dict[str, Any]] = {"over_depth": "constant", "per": "batch"}
    over_depth: Literal["linear", "constant"]
    per: Literal["sample", "batch"]

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace timm's module in each block with a rate above zero."""
        there = [module for module in model.modules() if isinstance(module, DropPath)]
        rate = max((module.drop_prob for module in there), default=0.0)
        if rate == 0:
            raise ReplacementError(
                "model.stochastic_depth: needs drop_path; add drop_path: 0.05, "
                "or leave model.stochastic_depth out"
            )
        names = [name for stage in blocks(model) for name in stage]
        rates = {name: rate * self._share(place, len(names)) for place, name in enumerate(names)}
        places = [
            place
            for name in names
            if rates[name] > 0
            for place in self._put(model, name, rates[name])
        ]
        check_inserted(model, "stochastic_depth", places, image_px)
        note = (
            f"rate {min(rates.values()):g} to {rate:g} over {len(names)} blocks, "
            f"sampled per {self.per}"
        )
        after = "DropPath" if self.per == "sample" else "BatchDropPath"
        return Replacement(
            "stochastic_depth", counted(there), after, tuple(name for _, name in places), note
        )

    def _share(self, place: int, num_blocks: int) -> float:
        return 1.0 if self.over_depth == "constant" else place / max(num_blocks - 1, 1)

    def _put(self, model: nn.Module, name: str, rate: float) -> list[tuple[str, str]]:
        block = model.get_submodule(name)
        new = DropPath if self.per == "sample" else BatchDropPath
        if hasattr(block, "drop_path"):
            add_to_branch_end(block, "drop_path", new(rate))
            inner = ".drop_path" if type(block.drop_path) is nn.Sequential else ""
            return [(name, f"{name}.drop_path{inner}")]
        if not all(hasattr(block, key) for key in _OF_TRANSFORMERS):
            raise ReplacementError(
                f"model.stochastic_depth: {name} is a {type(block).__name__}, which has "
                "no drop_path; leave model.stochastic_depth out"
            )
        for key in _OF_TRANSFORMERS:
            setattr(block, key, new(rate))
        return [(name, f"{name}.{key}") for key in _OF_TRANSFORMERS]


class DropBlock(Part):
    """Squares of feature maps set to zero in training: `model.drop_block`.

    rate: the share of a map to drop, constant over training (the paper increases it). block_px: the
    side of a square, in pixels of the feature map; a smaller map gets squares of its own size.
    stages: in how many last stages; the paper took two. Its place is that of timm's ResNet: after
    the norm that feeds the last convolution of each branch, before the activation where that is a
    module of its own; ConvNeXt: after the norm of the depthwise convolution. The paper has it after
    every convolution and on the shortcut.

    Raises ReplacementError for blocks without such a norm.
    Source: Ghiasi et al. 2018, arXiv:1810.12890.
    """

    example: ClassVar[dict[str, Any]] = {"rate": 0.1, "block_px": 7, "stages": 2}
    rate: Annotated[float, Field(gt=0, lt=1)]
    block_px: Annotated[int, Field(ge=1, le=64)]
    stages: Annotated[int, Field(ge=1, le=4)]

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Add one module to each block of the last stages."""
        names = [name for stage in last_stages(model, "drop_block", self.stages) for name in stage]
        before = counted(model.get_submodule(name) for name in names)
        calls = branch_calls(model, names)
        places = [(name, self._put(model, name, calls[name])) for name in names]
        check_inserted(model, "drop_block", places)
        after = f"the same with {BlockDropout.__name__}"
        return Replacement(
            "drop_block",
            before,
            after,
            tuple(name for _, name in places),
            self._note(model, places, image_px),
        )

    def _put(self, model: nn.Module, name: str, calls: list[tuple[str, nn.Module, int]]) -> str:
        block, layer = model.get_submodule(name), BlockDropout(self.rate, self.block_px)
        if hasattr(block, "mlp"):
            place = branch_middles(model, [name], "drop_block")[0]
            place.insert(layer)
            return place.name
        norms = [call for call in before_last_convolution(calls) if is_norm(call[1])]
        if isinstance(getattr(block, "drop_block", None), nn.Identity):
            replace_module(model, f"{name}.drop_block", layer)
            return f"{name}.drop_block"
        if not norms:
            raise ReplacementError(
                f"model.drop_block: {name} is a {type(block).__name__} without a norm before its "
                "last convolution; leave model.drop_block out"
            )
        norm = norms[-1][0]
        # timm's *Act norms have a slot before their activation
        if isinstance(getattr(norms[-1][1], "drop", None), nn.Identity):
            replace_module(model, f"{norm}.drop", layer)
            return f"{norm}.drop"
        append_module(model, norm, layer)
        return f"{norm}.1"

    def _note(self, model: nn.Module, places: Iterable[tuple[str, str]], image_px: int) -> str:
        try:
            shapes = output_shapes(model, [name for _, name in places], image_px)
        except ReplacementError:  # build_model rejects the size later, and suggests another
            return ""
        sides = [min(shape[2:]) for shape in shapes.values()]
        smaller = sorted({side for side in sides if side < self.block_px}, reverse=True)
        if not smaller:
            return ""
        sizes = ", ".join(map(str, smaller))
        return f"squares reduced to {sizes} px, the map size for images of {image_px} px"


class LayerScale(Part):
    """Each channel of a residual branch times a learned scale that starts small:
    `model.layer_scale: 1.0e-6`.

    start: initial value of the scales. They come after the last norm and the attention of the
    branch, before stochastic depth and the addition. Where the branch's last gamma starts at zero
    too (`zero_init_last`), the scales have no gradient until that gamma has moved, and its own
    gradient is `start` times as large as without: the note mentions it, and `zero_init_last: false`
    avoids it.

    Raises ReplacementError for a model that has layer scale of its own.
    Source: Touvron et al. 2021, arXiv:2103.17239.
    """

    example: ClassVar[dict[str, Any]] = {"start": 1e-6}
    start: Annotated[float, Field(gt=0, lt=1)]

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Add scales to each block."""
        names = [name for stage in blocks(model) for name in stage]
        if any(
            isinstance(getattr(model.get_submodule(name), "gamma", None), nn.Parameter)
            for name in names
        ):
            raise ReplacementError(
                f"model.layer_scale: {type(model).__name__} has its own (gamma); "
                "use a model whose timm class takes ls_init_value"
            )
        before = counted(model.get_submodule(name) for name in names)
        norms = [
            [call[1] for call in calls if is_norm(call[1])]
            for calls in branch_calls(model, names).values()
        ]
        num_zero = sum(starts_at_zero(inner[-1]) for inner in norms if inner)
        places = branch_ends(model, names, "layer_scale")
        for place in places:
            place.insert(LayerScale2d(place.num_channels, init_values=self.start))
        check_inserted(model, "layer_scale", [(place.block, place.name) for place in places])
        note = (
            f"{num_zero} branches have a zero-initialized last gamma too: "
            "model.zero_init_last=false avoids it"
        )
        where = tuple(place.name for place in places)
        return Replacement(
            "layer_scale", before, "the same with LayerScale2d", where, note if num_zero else ""
        )


class BatchDropPath(nn.Module):
    """A residual branch dropped for a whole micro-batch at once, with probability drop_prob, in
    training only.

    A kept branch is multiplied by 1 / (1 - drop_prob), which preserves its mean; Huang et al.
    instead multiply it by 1 - drop_prob in evaluation, the same up to that scale.

    Called with features [B, ...]; returns the same shape. Samples one number from torch's generator
    of their device.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return features
        keep = 1 - self.drop_prob
        return features * features.new_empty((1,) * features.ndim).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class BlockDropout(nn.Module):
    """Squares of a feature map set to zero, independently per channel, the rest scaled up to match;
    in training only.

    The corners of b x b squares are sampled with probability gamma = rate * H W / (b**2 (H - b + 1)
    (W - b + 1)) wherever a square fits into the map; the rest is divided by the share of pixels
    kept. A map smaller than b gets squares of its own size. timm's layer also samples squares that
    reach outside, with the same gamma: it drops more, nearly everything in a 7 x 7 map with b = 7.

    Called with features [B, C, H, W]; returns the same shape.

    Source: Ghiasi et al. 2018, arXiv:1810.12890, algorithm 1.
    """

    def __init__(self, rate: float, block_px: int):
        super().__init__()
        self.rate = rate
        self.block_px = block_px

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] with squares dropped in training; unchanged in evaluation."""
        if not self.training:
            return features
        num_images, num_channels, height, width = features.shape
        side = min(self.block_px, height, width)
        rows, columns = height - side + 1, width - side + 1
        gamma = min(1.0, self.rate * height * width / (side**2 * rows * columns))
        with torch.no_grad():
            corners = features.new_empty(num_images, num_channels, rows, columns).bernoulli_(gamma)
            dropped = functional.max_pool2d(functional.pad(corners, [side - 1] * 4), side, stride=1)
            kept = 1 - dropped
            # summed in float32: bfloat16 counts no further than 256
            kept *= (kept.numel() / kept.sum(dtype=torch.float32).clamp(min=1)).to(kept.dtype)
        return features * kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, block_px={self.block_px}"
