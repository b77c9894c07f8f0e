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
_CHANNELS_PER_WORD = 3  # 24 bits, which float32 holds exactly


def affine(images: Tensor, matrices: Tensor, interpolation: str, axes: str, fill: tuple[int, ...]) -> Tensor:
    """Every image read through its own matrix.

    images: [N, C, H, W] uint8. matrices: [N, 6] float64. fill: one value in 0..255 per channel.
    axes: along which axes pixels move, "x", "y" or "xy"; along the other one nothing needs to be interpolated.
    Gives [N, C, H, W] uint8.
    """
    num_taps = NUM_TAPS[interpolation]
    num_across, num_down = (num_taps if axis in axes else 1 for axis in "xy")
    height, width = images.shape[2:]
    positions = _nearest_positions if num_taps == 1 else _exact_positions
    x, y = positions(matrices.to(images.device), height, width, axes)
    left, across, inside_x = _taps(x, width, num_across)
    top, down, inside_y = _taps(y, height, num_down)
    stride = width + num_across // 2 * 2
    fill_place = (height + num_down // 2 * 2) * stride
    index = torch.where(inside_x & inside_y, (top * stride + left).long(), fill_place).flatten(1)
    colours = torch.tensor(fill, dtype=torch.uint8, device=images.device).view(1, -1, 1, 1)
    parts = []
    for part, colour in zip(images.split(_CHANNELS_PER_WORD, 1), colours.split(_CHANNELS_PER_WORD, 1), strict=True):
        words = _with_margins(_packed(part), _packed(colour), num_across, num_down)
        parts.append(_sampled(words, index, stride, across, down, part.shape[1]))
    return to_bytes(torch.cat(parts, 1)).view(images.shape)


def _exact_positions(matrices: Tensor, height: int, width: int, axes: str) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result is read, in px: x and y, [N, H, W] float64; along a still axis broadcastable."""
    row = torch.arange(height, dtype=torch.float64, device=matrices.device)[:, None] + 0.5
    column = torch.arange(width, dtype=torch.float64, device=matrices.device) + 0.5
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    x = a * column + (b * row + c) if "x" in axes else column[None, None]
    return x, d * column + (e * row + f) if "y" in axes else row[None]


def _nearest_positions(matrices: Tensor, height: int, width: int, axes: str) -> tuple[Tensor, Tensor]:
    """Which pixel is read, in whole px, [N, H, W]. PIL walks in steps of 2**-16 px, and the rounding shows: so do we."""
    row = torch.arange(height, device=matrices.device)[:, None]
    column = torch.arange(width, device=matrices.device)
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    centred = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    a, b, c, d, e, f = (centred * 65536.0 + 0.5).floor().long()
    return (a * column + b * row + c) >> 16, (d * column + e * row + f) >> 16


def _taps(position: Tensor, size_px: int, num_taps: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the filter reads along one axis.

    Gives its first pixel, counted in the source with margins; the weights of the pixels other than the nearer of the
    two middle ones, [N, 1, H * W] float32; and whether the position is inside the source.
    """
    inside = (position >= 0) & (position < size_px)
    if num_taps == 1:
        return position.floor(), [], inside
    position = position - 0.5
    start = position.floor()
    share = (position - start).float().flatten(1)[:, None]
    square, cube = share * share, share * share * share
    weights = [share] if num_taps == 2 else [2 * square - share - cube, share + square - cube, cube - square]
    # Bilinear begins at `start` with a margin of 1, bicubic one pixel earlier with a margin of 2.
    return start + 1, weights, inside


def _packed(images: Tensor) -> Tensor:
    """Up to three channels [N, C, H, W] uint8 in one word each: [N, H, W] int32, so that one read fetches a pixel."""
    words = images[:, 0].int()
    for channel in range(1, images.shape[1]):
        words = words | images[:, channel].int() << 8 * channel
    return words


def _with_margins(words: Tensor, colour: Tensor, num_across: int, num_down: int) -> Tensor:
    """[N, H, W] with its border repeated as far as the taps reach, flattened, then fill for one whole filter."""
    words = torch.cat([words[:, :1]] * (num_down // 2) + [words] + [words[:, -1:]] * (num_down // 2), 1)
    words = torch.cat([words[:, :, :1]] * (num_across // 2) + [words] + [words[:, :, -1:]] * (num_across // 2), 2)
    num_fills = (num_down - 1) * words.shape[2] + num_across
    return torch.cat([words.flatten(1), colour.flatten(1).expand(len(words), num_fills)], 1)


def _sampled(
    words: Tensor, index: Tensor, stride: int, across: list[Tensor], down: list[Tensor], num_channels: int
) -> Tensor:
    """The filtered values, the filter beginning at index [N, P] of words [N, ...]: [N, num_channels, P] float32."""
    shifts = torch.arange(0, 8 * num_channels, 8, dtype=torch.int32, device=words.device)[:, None]
    masks = 255 << shifts
    rows = []
    for row in range(_num_taps(down)):
        starts = range(row * stride, row * stride + _num_taps(across))
        # Each channel stays in its own bits of the word: a power of two times its value, divided out at the end.
        taps = [(words[:, start:].gather(1, index)[:, None] & masks).float() for start in starts]
        rows.append(_interpolated(taps, across))
    return _interpolated(rows, down).div_(1 << shifts)


def _num_taps(weights: list[Tensor]) -> int:
    return len(weights) + 1


def _interpolated(taps: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The weighted mean of the taps: one of the middle ones, plus the weighted differences of the others to it.

    So equal taps give their value exactly; a rounding error below it would be truncated to one grey level less.
    """
    if len(taps) == 4:
        taps = [taps[1], taps[0], *taps[2:]]
    here, *others = taps
    value = here.clone() if others else here
    for tap, weight in zip(others, weights, strict=True):
        value.addcmul_(tap.sub_(here), weight)
    return value


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


# Each operation's matrices from its argument, and the axes along which it moves pixels.
MATRICES: dict[str, tuple[Callable[[Tensor, int, int], Tensor], str]] = {
    "shear_x": (shear_x, "x"),
    "shear_y": (shear_y, "y"),
    "translate_x": (translate_x, "x"),
    "translate_y": (translate_y, "y"),
    "rotate": (rotate, "xy"),
}
