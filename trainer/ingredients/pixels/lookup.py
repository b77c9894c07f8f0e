"""Operations that give every pixel a new value by its old value alone, as tables of 256 entries.

Each function takes images [N, C, H, W] uint8 and what it needs per image as a float64 CPU tensor [N], and gives tables
[N, C, 256] uint8 (C may be 1 for all channels alike) on the images' device.

Source: PIL's ImageOps and ImageEnhance, whose rounding is kept: float32 blends and float64 contrasts, both truncated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.ingredients.pixels.color import blend, grey


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """The table's value for every pixel: images [N, C, H, W] and tables [N, C or 1, 256], both uint8."""
    pixels = images.flatten(2)
    tables = tables.expand(-1, pixels.shape[1], -1)
    return tables.gather(2, pixels.long()).view(images.shape)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Light and dark change places."""
    return (255 - _levels(images)).to(torch.uint8).expand(len(images), 1, 256)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the highest bits of a value stay, 0 to 8 of them; none leaves black, which newer PILs refuse."""
    step = _per_image(2 ** (8 - bits), images)
    return (_levels(images) // step * step).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on are inverted."""
    levels = _levels(images)
    return torch.where(levels < _per_image(threshold, images), levels, 255 - levels).to(torch.uint8)


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Values below 128 grow by a whole number."""
    levels = _levels(images)
    grown = (levels + _per_image(added, images)).clamp(max=255)
    return torch.where(levels < 128, grown, levels).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """A blend with black: factor 1 changes nothing, 0 is black."""
    levels = _levels(images).float()
    return blend(torch.zeros_like(levels), levels, _per_image(factor, images))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """A blend with the image's mean grey: factor 1 changes nothing, 0 is plain grey."""
    greys = grey(images).flatten(1)
    mean = (greys.sum(1, dtype=torch.int64).double() / greys.shape[1] + 0.5).floor().float()
    return blend(mean[:, None, None], _levels(images).float(), _per_image(factor, images))


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel is stretched to reach from 0 to 255; a channel of one value stays."""
    pixels = images.flatten(2)
    low, high = (end(2, keepdim=True).double() for end in (pixels.amin, pixels.amax))
    scale = torch.full_like(low, 255.0) / (high - low)  # torch takes 255.0 / x by way of 1 / x, which rounds twice
    levels = _levels(images)
    # Multiplied first, then shifted, as PIL does: the other order truncates some values elsewhere.
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return torch.where(scale.isinf(), levels, stretched).to(torch.uint8)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's values are spread until all are about equally frequent."""
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    # Whole numbers add up to the same sum in any order, so this is deterministic on every device.
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int64, device=images.device).expand_as(pixels))
    below = counts.cumsum(2) - counts
    brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step == 0, _levels(images).long(), spread).to(torch.uint8)


TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "brightness": brightness,
    "contrast": contrast,
}


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float64, device=images.device)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device)[:, None, None]
