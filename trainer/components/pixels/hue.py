"""Hues turned as PIL turns them: to HSV, and back.

Source: Pillow's rgb2hsv_row and hsv2rgb (Convert.c), after Python's colorsys; what C keeps as float
is rounded to it here too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.components.transfer import on

# Of each sixth of the circle, which of value, falling, low and rising red, green and blue are.
_OF_SIXTH = np.array([[0, 3, 2], [1, 0, 2], [2, 0, 3], [2, 1, 0], [3, 2, 0], [0, 2, 1]])


def hue_turned(images: Tensor, shift: Tensor) -> Tensor:
    """Images [N, 3, H, W] uint8 whose hue, in 256 steps around the circle, is `shift` [N] int64
    further.
    """
    hue, saturation, value = _to_hsv(images)
    return _to_rgb((hue + shift.view(-1, 1, 1)) % 256, saturation, value)


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3, H, W] uint8 to three of [N, H, W] int64 in 0..255."""
    red, green, blue = images.long().unbind(1)
    value, least = images.long().amax(1), images.long().amin(1)
    range_ = (value - least).clamp(min=1).float()
    from_red, from_green, from_blue = (
        ((value - one).float() / range_).double() for one in (red, green, blue)
    )
    hue = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(green == value, 2.0 + from_red - from_blue, 4.0 + from_green - from_red),
    )
    hue = _as_float(torch.fmod(_as_float(hue) / 6.0 + 1.0, 1.0))
    saturation = (range_ / value.clamp(min=1).float()).double()
    is_grey = value == least
    hue, saturation = ((255.0 * one).long().clamp(0, 255) for one in (hue, saturation))
    return hue.masked_fill(is_grey, 0), saturation.masked_fill(is_grey, 0), value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The way back: [N, 3, H, W] uint8."""
    place = hue.double() * 6.0 / 255.0
    sixth = place.floor()
    part = _as_float(place - sixth)
    share = _as_float(saturation.double() / 255.0)
    low, falling, rising = (
        _rounded(value * (1.0 - away))
        for away in (share, _as_float(share * part), share * (1.0 - part))
    )
    colours = torch.stack([value, falling, low, rising], 1)
    chosen = on(hue.device, _OF_SIXTH)[sixth.long() % 6].movedim(-1, 1)
    found = colours.gather(1, chosen)
    grey = value[:, None].expand_as(found)
    return torch.where(saturation[:, None] == 0, grey, found).to(torch.uint8)


def _as_float(values: Tensor) -> Tensor:
    """Double values, rounded to what a C float holds."""
    return values.float().double()


def _rounded(values: Tensor) -> Tensor:
    """C's round of values above 0, halves away from it."""
    return (values + 0.5).floor().long().clamp(0, 255)
