"""Blurs with a radius of its own for each image."""

from __future__ import annotations

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor
from torch.nn.functional import conv2d, pad

from trainer.components.pixels.by_pil import filtered_by_pil
from trainer.components.pixels.color import to_bytes
from trainer.components.transfer import on

_PASSES = 3
_ONE = 1 << 24  # PIL's weights are whole numbers of 2**-24


def box_blurred(images: Tensor, radius: np.ndarray) -> Tensor:
    """Three box blurs across and three down, of about a Gaussian's deviation: [N, C, H, W] uint8 to
    the same, for radius [N] float64 in px.

    Source: PIL's ImageFilter.GaussianBlur, which does it where images are on a CPU.
    """
    if images.device.type == "cpu":
        return filtered_by_pil(images, [ImageFilter.GaussianBlur(one) for one in radius.tolist()])
    return _box_blurred(images, radius)


def _box_blurred(images: Tensor, radius: np.ndarray) -> Tensor:
    """The same by tensor operations, in whole numbers as PIL's."""
    weights = on(images.device, _box_weights(radius))[:, None, :, None, None]
    values = images.long()
    for _ in range(2):  # along the last side, then, the sides changed, along the other
        for _ in range(_PASSES):
            values = _weighted(values, weights)
        values = values.transpose(2, 3)
    return values.to(torch.uint8)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Each value as the weighted sum of itself and its neighbours along the last side."""
    reach = weights.shape[2] // 2
    width = values.shape[-1]
    places = torch.arange(width + 2 * reach, device=values.device) - reach
    padded = values[..., places.clamp(0, width - 1)]
    total = torch.zeros_like(values)
    for place in range(2 * reach + 1):
        total += padded[..., place : place + width] * weights[:, :, place]
    return (total + (_ONE >> 1)) >> 24


def _box_weights(radius: np.ndarray) -> np.ndarray:
    """What a pixel's neighbours count: [N, 2 * reach + 1] int64, in float32 steps as PIL's."""
    sigma2 = (radius.astype(np.float32) ** 2 / np.float32(_PASSES)).astype(np.float32)
    length = np.sqrt(12.0 * sigma2.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    two, three, six = (np.float32(number) for number in (2, 3, 6))
    part = (two * whole + 1) * (whole * (whole + 1) - three * sigma2)
    part = part / (six * (sigma2 - (whole + 1) * (whole + 1)))
    box = whole + part
    inner = box.astype(np.int64)
    near = (np.float32(_ONE) / (box * two + 1)).astype(np.int64)
    far = (_ONE - (inner * 2 + 1) * near) // 2
    reach = int(inner.max()) + 1
    away = np.abs(np.arange(-reach, reach + 1))
    at_end = away == inner[:, None] + 1
    return np.where(away <= inner[:, None], near[:, None], np.where(at_end, far[:, None], 0))


def gaussian_blurred(images: Tensor, radius: np.ndarray, kernel_px: int) -> Tensor:
    """A Gaussian of kernel_px a side, the image mirrored at its outermost pixels: [N, C, H, W]
    uint8 to the same, for radius [N] float64, its deviation in px.

    Source: torchvision's gaussian_blur, across and down in place of both at once.
    """
    away = np.arange(kernel_px) - kernel_px // 2
    weights = np.exp(-0.5 * (away / radius[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    num_images, num_channels, height, width = images.shape
    kernels = on(images.device, weights.repeat(num_channels, axis=0))[:, None, None, :]
    reach = (kernel_px // 2,) * 4
    planes = pad(images.float().reshape(1, -1, height, width), reach, mode="reflect")
    planes = conv2d(planes, kernels, groups=num_images * num_channels)
    planes = conv2d(planes, kernels.transpose(2, 3), groups=num_images * num_channels)
    return to_bytes(planes.round_()).view(images.shape)
