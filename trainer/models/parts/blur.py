"""Anti-aliasing: a blur at strided convolutions and poolings."""

from __future__ import annotations

from collections.abc import Container
from math import comb
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from timm.layers import BlurPool2d
from torch import Tensor, nn
from torch.nn import functional

from trainer.models.edit.layer_kinds import CONVOLUTIONS
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    find_layers,
    has_activation,
    inside_attention,
    nothing_to_replace,
    replace_module,
)

Module = TypeVar("Module", bound=nn.Module)


class BlurPool(Part):
    """A low-pass filter at every downsampling: strided convolutions, and max pooling where asked.

    filter_px: the side of the binomial filter: 3 is [1, 2, 1] / 4 across and down.
    min_channels: convolutions of fewer input channels are kept as they are; absent: none is kept.
    place: "before", the blur and then the strided convolution (ffcv; composer's blur_first);
    "after", the convolution at stride 1 and then the strided blur (composer's other form);
    "after_activation", as after, but after the norm and the activation that follow the
    convolution, the paper's and timm's form: one without them, as on a shortcut, is kept as it is.
    padding: of the blur: "zeros" (ffcv, composer) or "reflect" (the paper, timm). pool: max pooling
    too, at stride 1 with the strided blur after it (the paper, timm, composer; not ffcv).

    Not in a union: `model.blur_pool: {filter_px: 3, min_channels: 16, place: before, padding:
    zeros, pool: false}`.

    Raises ReplacementError where no convolution is strided, or pool is asked and no max pooling is.
    Source: Zhang 2019, arXiv:1904.11486; ffcv-imagenet's train_imagenet.py (before).
    """

    example: ClassVar[dict[str, Any]] = {
        "filter_px": 3, "min_channels": 16, "place": "before", "padding": "zeros", "pool": False,
    }  # fmt: skip
    filter_px: Annotated[int, Field(ge=2, le=7)]
    min_channels: Annotated[int, Field(ge=1)] | None = None
    place: Literal["before", "after", "after_activation"]
    padding: Literal["zeros", "reflect"]
    pool: bool

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Insert the blur; the places are those of the convolutions and the poolings."""
        found = strided_modules(model, nn.Conv2d)
        strided = {
            name: conv
            for name, conv in found.items()
            if conv.in_channels >= (self.min_channels or 1)
        }
        behind = (
            _activations_behind(model, strided)
            if self.place == "after_activation"
            else dict.fromkeys(strided, "")
        )
        taken = {name: conv for name, conv in strided.items() if name in behind}
        pools = strided_modules(model, nn.MaxPool2d) if self.pool else {}
        if not taken:
            raise nothing_to_replace("blur_pool", "strided convolution that it applies to", model)
        if self.pool and not pools:
            kind = type(model).__name__
            raise ReplacementError(
                f"model.blur_pool.pool: {kind} has no strided max pooling; use false"
            )
        self._check_plain(taken)
        for name, conv in taken.items():
            self._put_behind(model, conv, behind[name]) if behind[name] else replace_module(
                model, name, self._around(conv)
            )
        for name, module in pools.items():
            replace_module(model, name, self._blurred(module))
        left = len(found) - len(taken)
        replaced: dict[str, nn.Module] = {**taken, **pools}
        places = tuple(name for name, _ in model.named_modules() if name in replaced)
        before = counted(replaced[name] for name in places)
        note = f"left: {left} other strided convolutions" if left else ""
        return Replacement(
            "blur_pool", before, f"Blur {self.place.replace('_', ' the ')}", places, note
        )

    def _check_plain(self, taken: dict[str, nn.Conv2d]) -> None:
        """Subclasses of Conv2d may keep a second copy of the stride, which would stay."""
        for name, conv in taken.items():
            if self.place != "before" and type(conv) is not nn.Conv2d:
                raise ReplacementError(
                    f"model.blur_pool.place: {name} is a {type(conv).__name__}; use place: before"
                )

    def _around(self, conv: nn.Conv2d) -> nn.Module:
        return BlurConv2d(
            conv, self.filter_px, self.padding, is_before=self.place == "before"
        ).train(conv.training)

    def _put_behind(self, model: nn.Module, conv: nn.Conv2d, activation: str) -> None:
        blur = Blur(self.filter_px, conv.stride, self.padding)
        conv.stride = (1, 1)
        replace_module(
            model,
            activation,
            nn.Sequential(model.get_submodule(activation), blur).train(conv.training),
        )

    def _blurred(self, pool: nn.MaxPool2d) -> nn.Module:
        # With ceil_mode the last window may reach outside: padding keeps the output size.
        padding = _half(pool.kernel_size) if pool.ceil_mode else pool.padding
        at_each = nn.MaxPool2d(pool.kernel_size, 1, padding)
        return nn.Sequential(at_each, Blur(self.filter_px, pool.stride, self.padding)).train(
            pool.training
        )


def _half(kernel: int | tuple[int, int]) -> int | tuple[int, int]:
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


def strided_modules(model: nn.Module, kind: type[Module]) -> dict[str, Module]:
    """Strided modules by name, but for those inside attention or another convolution."""
    in_attention = inside_attention(model)
    inside = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and stride_of(module) > 1
        and name not in in_attention and not name.startswith(tuple(inside))
    }  # fmt: skip


def _activations_behind(model: nn.Module, wanted: Container[str]) -> dict[str, str]:
    """For each wanted convolution the activation after its norm, unless also called elsewhere."""
    found = find_layers(model)
    norms = {place.name: place for place in found.norms}
    behind = {}
    for place in found.convolutions:
        norm = norms.get(place.norm or "") if place.name in wanted else None
        if norm is not None and has_activation(norm.module):
            behind[place.name] = f"{norm.name}.act"
        elif norm is not None and norm.activation is not None:
            behind[place.name] = norm.activation
    return {
        name: activation
        for name, activation in behind.items()
        if _num_calls(model, activation) == 1
    }


def _num_calls(model: nn.Module, name: str) -> int:
    calls: list[str] = []
    hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    try:
        find_layers(model)
    finally:
        hook.remove()
    return len(calls)


def stride_of(module: nn.Module) -> int:
    """The stride of a convolution or a pooling, the larger of two; 1 for any other module."""
    kinds = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d, BlurPool2d)
    stride = module.stride if isinstance(module, kinds) else 1
    return max(stride) if isinstance(stride, tuple) else stride


@CONVOLUTIONS.register
class Blur(nn.Module):
    """A binomial low-pass filter, [1, 2, 1] / 4 in both directions for filter_px 3, with a stride.

    A side of H pixels becomes ceil(H / stride). Odd filters at stride 2 are timm's BlurPool2d. No
    learned weights.

    Source: Zhang 2019, arXiv:1904.11486.
    """

    kernel: Tensor

    def __init__(self, filter_px: int, stride: int | tuple[int, ...], padding: str):
        super().__init__()
        self.stride = stride
        self.mode = {"reflect": "reflect", "zeros": "constant"}[padding]
        self.sides = ((filter_px - 1) // 2, filter_px // 2) * 2
        row = torch.tensor([comb(filter_px - 1, place) for place in range(filter_px)]) / 2 ** (
            filter_px - 1
        )
        self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H', W']."""
        channels = images.shape[1]
        kernel = self.kernel.to(images.dtype).expand(channels, 1, -1, -1)
        wide = functional.pad(images, self.sides, self.mode)
        return functional.conv2d(wide, kernel, stride=self.stride, groups=channels)

    def extra_repr(self) -> str:
        return f"{len(self.kernel)}, stride={self.stride}, padding={self.mode}"


@CONVOLUTIONS.register
class BlurConv2d(nn.Module):
    """A strided convolution after a blur, or one of stride 1 before a strided blur."""

    def __init__(self, conv: nn.Conv2d, filter_px: int, padding: str, is_before: bool):
        super().__init__()
        self.is_before = is_before
        self.blur = Blur(filter_px, 1 if is_before else conv.stride, padding)
        self.conv = conv
        if not is_before:
            conv.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        return self.conv(self.blur(images)) if self.is_before else self.blur(self.conv(images))
