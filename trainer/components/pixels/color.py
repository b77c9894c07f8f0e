"""Grey, blends, and the operation made of both.

Source: PIL's Image.convert("L"), Image.blend and ImageEnhance.Color, rounding included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.components.transfer import on


def grey(images: Tensor) -> Tensor:
    """The luma of RGB images [N, 3, H, W] uint8: [N, H, W] int32 in 0..255.

    Source: ITU-R BT.601 weights in 16-bit fixed point, as PIL has them.
    """
    assert images.shape[1] == 3, "grey needs red, green and blue"
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def blend(start: Tensor, end: Tensor, factor: np.ndarray) -> Tensor:
    """start + factor * (end - start), clipped and truncated: float32 in 0..255 to uint8.

    start, end: first dimension N, broadcastable to one another. factor: [N] float64, 0 gives start
    and 1 gives end; outside [0, 1] it extrapolates.
    """
    line = end - start
    factors = on(line.device, factor.astype(np.float32))
    return to_bytes((factors.view(-1, *[1] * (line.ndim - 1)) * line).add_(start))


def to_bytes(values: Tensor) -> Tensor:
    """Float values clipped to 0..255, in place, and truncated: to uint8."""
    # By way of int16: torch on a CPU converts float to uint8 one value at a time.
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def color(images: Tensor, factor: np.ndarray) -> Tensor:
    """A blend with the grey image: factor 1 changes nothing, 0 is grey.

    images: [N, 3, H, W] uint8. factor: [N] float64. Gives [N, 3, H, W] uint8.
    """
    return blend(grey(images).float()[:, None], images.float(), factor)
