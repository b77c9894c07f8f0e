"""Padding of strided convolutions and poolings as TensorFlow and flax have it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from trainer.models.edit.layer_kinds import CONVOLUTIONS
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    counted,
    nothing_to_replace,
    replace_module,
)
from trainer.models.parts.blur import strided_modules


class SamePadding(Part):
    """Strided convolutions and max poolings pad only what their last window needs, the odd row on
    the right and below: "SAME". timm's pad both sides alike, so that their windows lie elsewhere: a
    3x3 convolution of stride 2 over an even side starts at pixel 0 here, at -1 there.

    Convolutions no larger than their stride are kept: they need no padding. pool: max pooling too.

    Not in a union: `model.same_padding: {pool: true}`.

    Raises ReplacementError where nothing is strided.
    Source: TensorFlow's padding="SAME", the default of flax's convolutions.
    """

    example: ClassVar[dict[str, Any]] = {"pool": True}
    pool: bool

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Wrap them; the places are those of the convolutions and the poolings."""
        found: dict[str, Any] = dict(strided_modules(model, nn.Conv2d))
        if self.pool:
            found |= strided_modules(model, nn.MaxPool2d)
        taken = {
            name: found[name]
            for name, module in model.named_modules()  # in the model's order
            if name in found
            and any(kernel > stride for kernel, stride, _ in zip(*_shape(module), strict=True))
        }
        if not taken:
            raise nothing_to_replace("same_padding", "strided convolution that pads", model)
        for name, module in taken.items():
            replace_module(model, name, SamePadded(module).train(module.training))
        left = len(found) - len(taken)
        return Replacement(
            "same_padding",
            counted(taken.values()),
            "SamePadded",
            tuple(taken),
            f"left: {left} without padding" if left else "",
        )


def _shape(module: Any) -> list[tuple[int, int]]:
    """Kernel, stride and dilation of a convolution or a pooling, down and across."""
    values = (module.kernel_size, module.stride, module.dilation)
    return [value if isinstance(value, tuple) else (value, value) for value in values]


@CONVOLUTIONS.register
class SamePadded(nn.Module):
    """A convolution or a max pooling [B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)].

    The padding is zeros before a convolution, minus infinity before a pooling.
    """

    def __init__(self, conv: nn.Conv2d | nn.MaxPool2d) -> None:
        super().__init__()
        self.conv = conv
        self.shape = _shape(conv)
        self.fill = 0.0 if isinstance(conv, nn.Conv2d) else float("-inf")
        conv.padding = (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        kernels, strides, dilations = self.shape
        sides = []
        for axis in (1, 0):  # functional.pad takes the last axis first
            stride, side = strides[axis], images.shape[2 + axis]
            reach = dilations[axis] * (kernels[axis] - 1) + 1
            missing = max((-(-side // stride) - 1) * stride + reach - side, 0)
            sides += [missing // 2, missing - missing // 2]
        return self.conv(functional.pad(images, sides, value=self.fill))
