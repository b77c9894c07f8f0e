"""Operations that give every pixel a new value by its old value alone, as tables of 256 entries.

Fixed tables follow from the argument: each function takes it as [N] float64 and gives [N, 256]
numbers in 0..255. Measured tables follow from the image too: each function takes images [N, C, H,
W] uint8 and the argument, and gives [N, C or 1, 256] uint8 on the images' device.

Source: PIL's ImageOps and ImageEnhance, whose rounding is kept: float32 blends and float64
contrasts, both truncated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.components.pixels.color import blend, grey

_LEVELS = np.arange(256)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """The table's value for every pixel: images [N, C, H, W] and tables [N, C, 256], both uint8."""
    if images.device.type == "cpu":
        return _translated(images, tables)
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def _translated(images: Tensor, tables: Tensor) -> Tensor:
    """look_up on a CPU: Python translates bytes several times as fast as torch gathers them by
    64-bit places.
    """
    each_table = tables.numpy()
    is_one_table = (each_table == each_table[:, :1]).all((1, 2)).tolist()
    parts = []
    for image, of_channels, is_one in zip(images.numpy(), each_table, is_one_table, strict=False):
        each = [(image, of_channels[0])] if is_one else zip(image, of_channels, strict=False)
        parts += [pixels.tobytes().translate(table.tobytes()) for pixels, table in each]
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8).view(images.shape)


def invert(argument: np.ndarray) -> np.ndarray:
    """Light and dark change places."""
    return np.broadcast_to(255 - _LEVELS, (len(argument), 256))


def posterize(bits: np.ndarray) -> np.ndarray:
    """Only the highest bits of a value stay, 0 to 8 of them; none leaves black, which newer PILs
    refuse.
    """
    step = 2 ** (8 - bits[:, None])
    return _LEVELS // step * step


def solarize(threshold: np.ndarray) -> np.ndarray:
    """Values from the threshold on are inverted."""
    return np.where(threshold[:, None] > _LEVELS, _LEVELS, 255 - _LEVELS)


def solarize_add(added: np.ndarray) -> np.ndarray:
    """Values below 128 grow by a whole number."""
    return np.where(_LEVELS < 128, np.minimum(255, _LEVELS + added[:, None]), _LEVELS)


def brightness(factor: np.ndarray) -> np.ndarray:
    """A blend with black: factor 1 changes nothing, 0 is black."""
    return np.clip(factor[:, None].astype(np.float32) * _LEVELS.astype(np.float32), 0, 255)


def contrast(images: Tensor, factor: np.ndarray) -> Tensor:
    """A blend with the image's mean grey: factor 1 changes nothing, 0 is plain grey.

    The grey of RGB is its luma; of any other number of channels, as of PIL's "L", the values
    themselves.
    """
    greys = (grey(images) if images.shape[1] == 3 else images).flatten(1)
    mean = (greys.sum(1, dtype=torch.int64).double() / greys.shape[1] + 0.5).floor().float()
    return blend(mean[:, None, None], _levels(images).float()[None, None], factor)


def autocontrast(images: Tensor, argument: np.ndarray) -> Tensor:
    """Each channel is stretched to reach from 0 to 255; a channel of one value stays."""
    pixels = images.flatten(2)
    low, high = (end(2, keepdim=True).double() for end in (pixels.amin, pixels.amax))
    # torch takes 255.0 / x by way of 1 / x, which rounds twice
    scale = torch.full_like(low, 255.0) / (high - low)
    levels = _levels(images)
    # Multiplied first, then shifted, as PIL does: the other order truncates some values elsewhere.
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return torch.where(scale.isinf(), levels, stretched).to(torch.uint8)


def equalize(images: Tensor, argument: np.ndarray) -> Tensor:
    """Each channel's values are spread until all are about equally frequent."""
    pixels = images.flatten(2)
    counts = _counts(pixels)
    below = counts.cumsum(2) - counts
    brightest = counts.gather(2, pixels.amax(2, keepdim=True).long())
    step = (pixels.shape[2] - brightest) // 255
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step == 0, _levels(images).long(), spread).to(torch.uint8)


def _counts(pixels: Tensor) -> Tensor:
    """How often each value stands in each channel: [N, C, P] uint8 to [N, C, 256] int64."""
    if pixels.device.type == "cpu":
        each = [torch.bincount(channel, minlength=256) for channel in pixels.flatten(0, 1)]
        return torch.stack(each).view(*pixels.shape[:2], 256)
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    # Whole numbers add up to the same sum in any order, so this is deterministic on every device.
    ones = torch.ones((), dtype=torch.int64, device=pixels.device).expand(pixels.shape)
    return counts.scatter_add_(2, pixels.long(), ones)


FIXED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "brightness": brightness,
}
MEASURED: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
    "contrast": contrast,
    "autocontrast": autocontrast,
    "equalize": equalize,
}


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float64, device=images.device)
