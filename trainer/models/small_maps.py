"""Convolutions in training on a CPU, over maps smaller than their kernels: taps that meet nothing
but padding are left out.

A 3 x 3 kernel over a map of 1 x 1 uses its middle alone; oneDNN multiplies all nine, and spent two
fifths of a ResNet-18 step at 32 px on such kernels' gradients. What is left out is a sum of zeros:
results and gradients are the same but for the order of a sum, and unused taps keep a gradient of
exactly zero. In evaluation nothing changes, not a bit.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn


def leave_out_padding_taps(model: nn.Module) -> None:
    """Let every torch convolution of a model, weight standardization included, leave out what only
    padding would meet.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and _is_plain(module):
            # _conv_forward and not a hook on forward, which would not see the weight that a
            # subclass has standardized; a bound method, so that copies are bound to themselves
            bound = types.MethodType(_conv_forward, module)
            module._conv_forward = bound  # type: ignore[method-assign]  # of this one instance


def used_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int]:
    """(first, end, padding): the taps of a kernel that any output of a map of `size` uses, and the
    padding that they need.

    One axis, without dilation. (0, kernel, padding) where all are used, or no symmetric padding
    gives as many outputs.
    """
    num_out = (size + 2 * padding - kernel) // stride + 1
    used = [
        tap
        for tap in range(kernel)
        if any(0 <= out * stride - padding + tap < size for out in range(num_out))
    ]
    if not used:
        return 0, kernel, padding
    first, end = used[0], used[-1] + 1
    left = padding - first
    if left < 0 or (size + 2 * left - (end - first)) // stride + 1 != num_out:
        return 0, kernel, padding
    return first, end, left


def _is_plain(module: nn.Conv2d) -> bool:
    is_whole = type(module)._conv_forward is nn.Conv2d._conv_forward
    return (
        is_whole
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.dilation == (1, 1)
    )


def _conv_forward(self: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] through the taps of `weight` [O, C / groups, K, K] that are used."""
    if not self.training:
        return nn.Conv2d._conv_forward(self, images, weight, bias)
    padding = self.padding
    assert not isinstance(padding, str)  # _is_plain
    (top, bottom, above), (left, right, beside) = (
        used_taps(images.shape[2 + axis], self.kernel_size[axis], self.stride[axis], padding[axis])
        for axis in (0, 1)
    )
    if (bottom - top, right - left) == self.kernel_size:
        return nn.Conv2d._conv_forward(self, images, weight, bias)
    part = weight[:, :, top:bottom, left:right]
    return torch.nn.functional.conv2d(
        images, part, bias, self.stride, (above, beside), 1, self.groups
    )
