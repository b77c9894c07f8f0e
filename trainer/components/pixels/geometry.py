"""Operations that move pixels: one affine sampling for all of them.

A matrix row [6] = (a, b, c, d, e, f) says where the result's pixel (x, y) is read: at (a x + b y +
c, d x + e y + f) px of the source, where pixel centres lie at half-integers. What is read outside
the source is the fill colour.

Source: PIL's Image.transform and Image.rotate. Its bicubic filter has a = -1 here (its resize has
-0.5, torch -0.75), neighbours beyond the border repeat the border, and results are truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.components.pixels.color import to_bytes
from trainer.components.transfer import colour_on, on

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_NEAREST, _BILINEAR, _BICUBIC = range(3)
_CHANNELS_PER_WORD = 3  # 24 bits, which float32 holds exactly


class _Reach(NamedTuple):
    """What the filter reads along one axis, for every pixel of the result.

    first: its first pixel, counted from the beginning of the margin; broadcastable to [N, H, W].
    is_inside: whether the position is inside the source; broadcastable to [N, H, W].
    weights: of the differences between its other pixels and the left one of the middle, [N, 1, H *
    W] float32 each.
    """

    first: Tensor
    is_inside: Tensor
    weights: list[Tensor]

    @property
    def num_taps(self) -> int:
        """How many pixels the filter reads."""
        return len(self.weights) + 1

    @property
    def margin_px(self) -> int:
        """How far it reads beyond either border."""
        return self.num_taps // 2


def affine(
    images: Tensor, matrices: np.ndarray, filters: np.ndarray, axes: str, fill: tuple[int, ...]
) -> Tensor:
    """Every image read through its own matrix.

    images: [N, C, H, W] uint8. matrices: [N, 6] float64.
    filters: [N] int64, places in INTERPOLATIONS; nearest for all images or for none.
    axes: along which axes pixels may move, "x", "y" or "xy"; along the other one nothing is
    interpolated. fill: one value in 0..255 per channel. Gives [N, C, H, W] uint8.
    """
    if len(axes) == 1 and filters.min() != _NEAREST:
        return _moved_along(images, matrices, filters, axes, fill)
    across, down = (_reach(images, matrices, filters, axis, axis in axes) for axis in "xy")
    height, width = images.shape[2:]
    stride = width + 2 * across.margin_px
    fill_place = (height + 2 * down.margin_px) * stride
    index = (down.first * stride + across.first).long()
    index = torch.where(down.is_inside & across.is_inside, index, fill_place).flatten(1)
    colours = colour_on(images.device, fill)
    parts = []
    for part, colour in zip(
        images.split(_CHANNELS_PER_WORD, 1), colours.split(_CHANNELS_PER_WORD, 1), strict=True
    ):
        words = _with_margins(_packed(part), _packed(colour), across, down)
        parts.append(_sampled(words, index, stride, across.weights, down.weights, part.shape[1]))
    return to_bytes(torch.cat(parts, 1) if len(parts) > 1 else parts[0]).view(images.shape)


def _moved_along(
    images: Tensor, matrices: np.ndarray, filters: np.ndarray, axis: str, fill: tuple[int, ...]
) -> Tensor:
    """affine along one axis: all pixels of a line are read at one distance, so there is one place
    and one set of weights per line.
    """
    dim, across = (3, 2) if axis == "x" else (2, 3)
    length_px, width_px = images.shape[dim], images.shape[across]
    per_line, start = matrices[:, 1 if axis == "x" else 3], matrices[:, 2 if axis == "x" else 5]
    # Where each line's first pixel is read, counted from the centre of the source's first pixel:
    # [N, lines].
    begin = start[:, None] + per_line[:, None] * 0.5 + per_line[:, None] * np.arange(width_px)
    floor = np.floor(begin)
    # of what is inside
    edges = np.ceil(np.stack([-0.5 - begin, length_px - 0.5 - begin])).astype(np.int64)
    share = on(images.device, (begin - floor).astype(np.float32))[:, None]
    weights = [_along(weight, dim) for weight in _weights(share, filters)]
    num_taps = len(weights) + 1
    first, from_, to = (
        _along(on(images.device, each)[:, None], dim) for each in (floor.astype(np.int64), *edges)
    )
    places = torch.arange(length_px + num_taps - 1, device=images.device).view(-1, *[1] * (3 - dim))
    index = (places + (first - (num_taps // 2 - 1))).clamp_(0, length_px - 1)
    read = _read_along(images, index, dim).float()
    taps = [read.narrow(dim, tap, length_px) for tap in range(num_taps)]
    places = places.narrow(0, 0, length_px)
    inside = ((places >= from_) & (places < to)).to(torch.uint8).neg_()  # 255 there, 0 elsewhere
    # By bits: torch on a CPU chooses between uint8 values one at a time.
    return (to_bytes(_interpolated(taps, weights)) & inside) | (
        colour_on(images.device, fill) & ~inside
    )


def _read_along(images: Tensor, index: Tensor, dim: int) -> Tensor:
    """Each line [N, C, H, W] at the places [N, 1, ...] along dimension dim, 2 or 3: as long as
    index is.
    """
    if dim == 3:
        return images.gather(3, index.expand(-1, images.shape[1], -1, -1))
    # Torch gathers along the last dimension several times as fast.
    width = images.shape[3]
    flat = (index * width).add_(torch.arange(width, device=images.device)).flatten(1)
    return (
        images.flatten(2)
        .gather(2, flat[:, None].expand(-1, images.shape[1], -1))
        .unflatten(2, (-1, width))
    )


def _along(lines: Tensor, dim: int) -> Tensor:
    """One value for each line [N, 1, lines], to broadcast along dimension dim of [N, C, H, W]."""
    return lines.unsqueeze(dim)


def _reach(
    images: Tensor, matrices: np.ndarray, filters: np.ndarray, axis: str, moves: bool
) -> _Reach:
    height, width = images.shape[2:]
    size_px = width if axis == "x" else height
    if not moves:
        places = torch.arange(size_px, device=images.device)
        return _Reach(
            places if axis == "x" else places[:, None],
            torch.ones_like(places[:1], dtype=torch.bool),
            [],
        )
    per_column, per_row, start = (matrices[:, :3] if axis == "x" else matrices[:, 3:]).T
    start = start + per_column * 0.5 + per_row * 0.5  # the centre of the result's first pixel
    if filters.max() == _NEAREST:
        # PIL walks in steps of 2**-16 px, and the rounding shows: so do we.
        per_column, per_row, start = (
            np.floor(entry * 65536.0 + 0.5).astype(np.int64)
            for entry in (per_column, per_row, start)
        )
        place = _walked(per_column, per_row, start, height, width, images.device) >> 16
        return _Reach(place, (place >= 0) & (place < size_px), [])
    # Counted from the centre of the source's first pixel, so that whole numbers are pixels.
    position = _walked(per_column, per_row, start - 0.5, height, width, images.device)
    first = position.floor()
    is_inside = (position >= -0.5) & (position < size_px - 0.5)
    share = (position - first).float().flatten(1)[:, None]
    # Bilinear begins here with a margin of 1, bicubic one pixel earlier with a margin of 2.
    return _Reach(first + 1, is_inside, _weights(share, filters))


def _walked(
    per_column: np.ndarray,
    per_row: np.ndarray,
    start: np.ndarray,
    height: int,
    width: int,
    device: torch.device,
) -> Tensor:
    """start + row * per_row + column * per_column, all three [N]: [N, H, W] in their dtype."""
    begin = on(device, start[:, None] + per_row[:, None] * np.arange(height))
    step = on(device, per_column)
    return begin[:, :, None] + step[:, None, None] * torch.arange(width, device=device)


def _weights(share: Tensor, filters: np.ndarray) -> list[Tensor]:
    """The weights at `share` [N, 1, P] of the way between the two middle pixels.

    Bilinear: of (right - left). With bicubic images also of (left - outer left) and (left - outer
    right), which are zero where an image is bilinear: the cubic with a = -1 is the straight line
    and a multiple of s (1 - s).
    """
    if filters.max() == _BILINEAR:
        return [share]
    rest = 1 - share
    bend = share * rest
    if filters.min() == _BILINEAR:
        bend *= on(share.device, (filters == _BICUBIC).astype(np.float32))[:, None, None]
    outer_right = bend * share
    return [share + outer_right, bend * rest, outer_right]


def _packed(images: Tensor) -> Tensor:
    """Up to three channels [N, C, H, W] uint8 in one word each: [N, H, W] int32, so that one read
    fetches a pixel.
    """
    return (images.int() << _shifts(images.shape[1], images.device)[:, None]).sum(
        1, dtype=torch.int32
    )


def _shifts(num_channels: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * num_channels, 8, dtype=torch.int32, device=device)[:, None]


def _with_margins(words: Tensor, colour: Tensor, across: _Reach, down: _Reach) -> Tensor:
    """[N, H, W] with its border repeated as far as the filter reaches, flattened, then fill for one
    whole filter.
    """
    words = torch.cat(
        [words[:, :1]] * down.margin_px + [words] + [words[:, -1:]] * down.margin_px, 1
    )
    words = torch.cat(
        [words[:, :, :1]] * across.margin_px + [words] + [words[:, :, -1:]] * across.margin_px, 2
    )
    num_fills = (down.num_taps - 1) * words.shape[2] + across.num_taps
    return torch.cat([words.flatten(1), colour.flatten(1).expand(len(words), num_fills)], 1)


def _sampled(
    words: Tensor,
    index: Tensor,
    stride: int,
    across: list[Tensor],
    down: list[Tensor],
    num_channels: int,
) -> Tensor:
    """The filtered values, the filter beginning at index [N, P] of words [N, ...]: [N,
    num_channels, P] float32.
    """
    shifts = _shifts(num_channels, words.device)
    masks = (255 << shifts)[:, :, None]
    num_across = len(across) + 1
    everywhere = index[:, None].expand(-1, num_across, -1)
    rows = []
    for row in range(len(down) + 1):
        # Overlapping views, one pixel apart: one gather reads the whole row of taps without any
        # arithmetic on indices.
        views = words[:, row * stride :].unfold(1, num_across, 1).transpose(1, 2)
        read = views.gather(2, everywhere)[:, None]
        # Each channel stays in its own bits of the word: a power of two times its value, divided
        # out at the end.
        rows.append(_interpolated((read & masks).float().unbind(2), across))
    return _interpolated(rows, down) / (1 << shifts)


def _interpolated(taps: Sequence[Tensor], weights: list[Tensor]) -> Tensor:
    """The left one of the middle taps, plus weighted differences to it.

    So equal taps give their value exactly; a rounding error below it would be truncated to one grey
    level less.
    """
    if len(taps) == 1:
        return taps[0]
    if len(taps) == 2:
        return torch.addcmul(taps[0], taps[1] - taps[0], weights[0])
    outer_left, left, right, outer_right = taps
    value = torch.addcmul(left, right - left, weights[0])
    value.addcmul_(left - outer_left, weights[1])
    return value.addcmul_(left - outer_right, weights[2])
