"""Operations that move pixels: one affine sampling for all of them.

A matrix row [6] = (a, b, c, d, e, f) says where the result's pixel (x, y) is read: at (a x + b y + c, d x + e y + f) px
of the source, where pixel centres lie at half-integers. What is read outside the source is the fill colour.

Source: PIL's Image.transform and Image.rotate. Its bicubic filter has a = -1 here (its resize has -0.5, torch -0.75),
neighbours beyond the border repeat the border, and results are truncated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.ingredients.pixels.color import to_bytes

NUM_TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
INTERPOLATIONS = tuple(NUM_TAPS)
_CHANNELS_PER_WORD = 4


def affine(images: Tensor, matrices: Tensor, interpolation: str, fill: tuple[int, ...]) -> Tensor:
    """Every image read through its own matrix.

    images: [N, C, H, W] uint8. matrices: [N, 6] float64. fill: one value in 0..255 per channel.
    Gives [N, C, H, W] uint8.
    """
    num_taps = NUM_TAPS[interpolation]
    positions = _nearest_positions if num_taps == 1 else _exact_positions
    x, y = positions(matrices.to(images.device), *images.shape[2:])
    left, across = _first_tap(x, num_taps)
    top, down = _first_tap(y, num_taps)
    height, width = images.shape[2:]
    stride = width + 2 * (num_taps // 2)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    fill_place = (height + 2 * (num_taps // 2)) * stride
    index = torch.where(inside, (top * stride + left).long(), fill_place).flatten(1)
    colours = torch.tensor(fill, dtype=torch.uint8, device=images.device).view(1, -1, 1, 1)
    parts = []
    for part, colour in zip(images.split(_CHANNELS_PER_WORD, 1), colours.split(_CHANNELS_PER_WORD, 1), strict=True):
        words = _with_margins(_packed(part), _packed(colour), num_taps)
        rows = []
        for row in range(num_taps):
            starts = range(row * stride, row * stride + num_taps)
            rows.append(_interpolated([_read(words[:, s:], index, part.shape[1]) for s in starts], across))
        parts.append(_interpolated(rows, down))
    return to_bytes(torch.cat(parts, 1)).view(images.shape)


def _exact_positions(matrices: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result is read, in px: x and y, each [N, H, W] float64."""
    row = torch.arange(height, dtype=torch.float64, device=matrices.device)[:, None] + 0.5
    column = torch.arange(width, dtype=torch.float64, device=matrices.device) + 0.5
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    return a * column + b * row + c, d * column + e * row + f


def _nearest_positions(matrices: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Which pixel is read, in whole px. PIL walks in steps of 2**-16 px, and the rounding shows: so do we."""
    row = torch.arange(height, device=matrices.device)[:, None]
    column = torch.arange(width, device=matrices.device)
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    centred = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    a, b, c, d, e, f = (centred * 65536.0 + 0.5).floor().long()
    return (a * column + b * row + c) >> 16, (d * column + e * row + f) >> 16


def _first_tap(position: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """The first pixel that the filter reads, counted in the source with margins, and how far along the filter is.

    position: [N, H, W] px. Gives whole numbers [N, H, W] and shares of a pixel [N, 1, H * W] float32.
    """
    if num_taps == 1:
        return position, position.new_zeros(())
    start = (position - 0.5).floor()
    # Bilinear begins at `start` with a margin of 1, bicubic one pixel earlier with a margin of 2.
    return start + 1, (position - 0.5 - start).float().flatten(1)[:, None]


def _packed(images: Tensor) -> Tensor:
    """Up to four channels [N, C, H, W] uint8 in one word each: [N, H, W] int32, so that one read fetches a whole pixel."""
    words = images[:, 0].int()
    for channel in range(1, images.shape[1]):
        words = words | images[:, channel].int() << 8 * channel
    return words


def _with_margins(words: Tensor, colour: Tensor, num_taps: int) -> Tensor:
    """The border repeated num_taps // 2 times around [N, H, W], flattened, and enough fill for one whole filter."""
    margin = num_taps // 2
    words = torch.cat([words[:, :1]] * margin + [words] + [words[:, -1:]] * margin, 1)
    words = torch.cat([words[:, :, :1]] * margin + [words] + [words[:, :, -1:]] * margin, 2)
    num_fills = (num_taps - 1) * (words.shape[2] + 1) + 1
    return torch.cat([words.flatten(1), colour.flatten(1).expand(len(words), num_fills)], 1)


def _read(words: Tensor, index: Tensor, num_channels: int) -> Tensor:
    """The pixels at index [N, P] of words [N, ...]: [N, num_channels, P] float32."""
    shifts = torch.arange(0, 8 * num_channels, 8, dtype=torch.int32, device=words.device)[:, None]
    return (words.gather(1, index)[:, None] >> shifts).bitwise_and_(255).float()


def _interpolated(taps: list[Tensor], share: Tensor) -> Tensor:
    """The value at `share` of the way between the middle taps.

    Written as the nearer tap plus differences, so that equal taps give their value exactly: a rounding error below it
    would be truncated to one grey level less.
    """
    if len(taps) == 1:
        return taps[0]
    if len(taps) == 2:
        return torch.addcmul(taps[0], taps[1] - taps[0], share)
    before, here, after, beyond = taps
    square, cube = share * share, share * share * share
    value = torch.addcmul(here, before - here, 2 * square - share - cube)
    value.addcmul_(after - here, share + square - cube)
    return value.addcmul_(beyond - here, cube - square)


def _matrices(num: int, **entries: Tensor | float) -> Tensor:
    """Matrices [num, 6] float64 that leave every pixel where it is, except for the named entries."""
    matrices = torch.zeros(num, 6, dtype=torch.float64)
    for place, letter in enumerate("abcdef"):
        matrices[:, place] = entries.get(letter, 1.0 if letter in "ae" else 0.0)
    return matrices


def shear_x(factor: Tensor, height: int, width: int) -> Tensor:
    """Each row is read `factor` px further right than the row above."""
    return _matrices(len(factor), b=factor)


def shear_y(factor: Tensor, height: int, width: int) -> Tensor:
    """Each column is read `factor` px further down than the column to its left."""
    return _matrices(len(factor), d=factor)


def translate_x(shift_px: Tensor, height: int, width: int) -> Tensor:
    """All is read shift_px further right: the picture moves left."""
    return _matrices(len(shift_px), c=shift_px)


def translate_y(shift_px: Tensor, height: int, width: int) -> Tensor:
    """All is read shift_px further down: the picture moves up."""
    return _matrices(len(shift_px), f=shift_px)


def rotate(degrees: Tensor, height: int, width: int) -> Tensor:
    """The picture turns counter-clockwise about its middle."""
    angle = -torch.deg2rad(degrees % 360.0)
    # PIL rounds here, so that a quarter turn hits the pixel centres.
    cos, sin = torch.round(angle.cos(), decimals=15), torch.round(angle.sin(), decimals=15)
    x, y = width / 2, height / 2
    return _matrices(len(degrees), a=cos, b=sin, c=cos * -x + sin * -y + x, d=-sin, e=cos, f=-sin * -x + cos * -y + y)


MATRICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
