"""Operations that move pixels: one affine sampling for all of them.

A matrix row [6] = (a, b, c, d, e, f) says where the result's pixel (x, y) is read: at (a x + b y + c, d x + e y + f) px
of the source, where pixel centres lie at half-integers. What is read outside the source is the fill colour.

Source: PIL's Image.transform and Image.rotate. Its bicubic filter has a = -1 here (its resize has -0.5, torch -0.75),
neighbours beyond the border repeat the border, and results are truncated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.ingredients.pixels.color import to_bytes

NUM_TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
INTERPOLATIONS = tuple(NUM_TAPS)
_CHANNELS_PER_WORD = 3  # 24 bits, which float32 holds exactly
_STEPS_PER_PX = 1 << 16  # PIL's nearest filter walks in fixed point


def affine(
    images: Tensor, matrices: np.ndarray, interpolations: list[str], axes: str, fill: tuple[int, ...]
) -> Tensor:
    """Every image read through its own matrix.

    images: [N, C, H, W] uint8. matrices: [N, 6] float64. interpolations: one per image; "nearest" for all or for none.
    axes: along which axes pixels may move, "x", "y" or "xy"; along the other one nothing is interpolated.
    fill: one value in 0..255 per channel.
    Gives [N, C, H, W] uint8.
    """
    num_taps = max(NUM_TAPS[name] for name in interpolations)
    num_across, num_down = (num_taps if axis in axes else 1 for axis in "xy")
    height, width = images.shape[2:]
    x, y = (place.to(images.device) for place in _positions(matrices, height, width, num_taps == 1))
    curved = torch.tensor([float(name == "bicubic") for name in interpolations], device=images.device)
    left, across, inside_x = _taps(x if "x" in axes else x[:1, :1], width, num_across, curved)
    top, down, inside_y = _taps(y, height, num_down, curved)
    return images


def _along(
    matrices: np.ndarray, height: int, width: int, axis: str, device: torch.device, is_nearest: bool
) -> Tensor:
    """Where the result's pixels are read along one axis of the source, in px from the centre of its first pixel.

    [N, H, W] float64, or whole numbers in int64 where the nearest pixel is meant.
    """
    per_column, per_row, start = matrices[:, :3].T if axis == "x" else matrices[:, 3:].T
    start = start + 0.5 * per_column + 0.5 * per_row
    if is_nearest:
        # PIL walks in steps of 2**-16 px, and the rounding shows: so do we.
        per_column, per_row, start = (
            np.floor(value * _STEPS_PER_PX + 0.5).astype(np.int64) for value in (per_column, per_row, start)
        )
    else:
        start = start - 0.5
